"""The four services of a mesh."""

import os

# gRPC reads this once, when it is imported. At its default level it logs each connection whose TLS handshake fails: a
# line for every connection that anyone opens.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
