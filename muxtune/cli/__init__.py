"""The `muxtune` command."""

import os

# gRPC reads this once, when it is imported. Else it writes what a server says at its farewell to the terminal itself,
# control characters included. Its errors reach the user as statuses.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")
