"""mesh.json in a data folder: the addresses of a mesh's services, and the API key of its default tenant."""

import json
import os
from pathlib import Path
from typing import Any

from muxtune.local.errors import MeshError

_NAME = "mesh.json"


def read_state(data: Path) -> dict[str, Any]:
    """Return the contents of mesh.json, or an empty dict if there is none. Raises MeshError if it cannot be used."""
    path = data / _NAME
    try:
        state = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        raise MeshError(f"{data} is a file: pass the folder of a mesh as --data") from None
    except OSError as error:
        raise MeshError(f"{path} cannot be read: {error.strerror}: check its owner and mode") from None
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"not JSON ({error})") from None
    if not isinstance(state, dict) or not isinstance(state.get("api_key", ""), str):
        raise _damaged(path, "not an object with a string api_key")
    addresses = state.get("addresses", {})
    if not isinstance(addresses, dict) or not all(map(_is_address, addresses.values())):
        raise _damaged(path, "without addresses of the form HOST:PORT")
    return state


def write_state(data: Path, addresses: dict[str, str], api_key: str) -> None:
    """Write mesh.json for its owner only: whole or not at all, also where the machine stops meanwhile."""
    partial = data / f"{_NAME}.partial"
    partial.touch(mode=0o600)
    with partial.open("w") as file:
        json.dump({"addresses": addresses, "api_key": api_key}, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(data / _NAME)


def _damaged(path: Path, what: str) -> MeshError:
    return MeshError(f"{path} is damaged: {what}. Delete it; `muxtune up` writes a new one with a new API key")


def _is_address(value: object) -> bool:
    host, _, port = value.rpartition(":") if isinstance(value, str) else ("", "", "")
    return bool(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16
