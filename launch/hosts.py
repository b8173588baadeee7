"""The hosts file of `--target=ssh`: a host a line, `user@host:port slots=N`."""

import dataclasses
import re
from pathlib import Path

from model.errors import InputError

_ADDRESS = re.compile(
  r"(?:(?P<user>[^@\s]+)@)?"
  r"(?:\[(?P<ipv6>[0-9A-Fa-f:.%\w]+)\]|(?P<host>[^:@\s\[\]]+))"
  r"(?::(?P<port>\d+))?"
)
_LOOPBACK = re.compile(r"localhost|127\..*|::1")


@dataclasses.dataclass(frozen=True)
class Host:
  """A machine that ssh reaches.

  Attributes:
    name: as the ssh client knows it: a name, an address, or an alias of its configuration.
    slots: processes that run there; its GPUs are divided evenly among them.
  """

  name: str
  user: str | None = None
  port: int | None = None
  slots: int = 1

  @property
  def destination(self) -> str:
    """What the ssh client is called with."""
    return self.name if self.user is None else f"{self.user}@{self.name}"

  @property
  def is_loopback(self) -> bool:
    """Whether other machines understand something else by this name."""
    return _LOOPBACK.fullmatch(self.name) is not None


def read_hosts(path: str) -> list[Host]:
  """The hosts of a file; # begins a comment.

  Raises:
    InputError: naming the line that is wrong; for a file without hosts, or one named twice.
  """
  try:
    text = Path(path).expanduser().read_text()
  except FileNotFoundError:
    raise InputError(f"--hosts_file={path}: there is no such file.") from None
  except UnicodeDecodeError:
    raise InputError(f"--hosts_file={path} is no text file.") from None
  hosts: list[Host] = []
  for number, line in enumerate(text.splitlines(), start=1):
    words = line.partition("#")[0].split()
    if words:
      host = _host(words, f"{path}, line {number}")
      if any((host.name, host.port) == (other.name, other.port) for other in hosts):
        raise InputError(f"{path}, line {number}: {host.name} is there twice; use slots=N.")
      hosts.append(host)
  if not hosts:
    raise InputError(f"--hosts_file={path} names no host: write one a line.")
  return hosts


def _host(words: list[str], place: str) -> Host:
  match = _ADDRESS.fullmatch(words[0])
  if match is None or words[0].startswith("-"):
    raise InputError(f"{place}: {words[0]!r} is no host; user@host:port is needed.")
  slots = "1"
  for word in words[1:]:
    key, _, slots = word.partition("=")
    if key != "slots" or len(words) > 2:
      raise InputError(f"{place}: {word!r} is not known; a host may be followed by slots=N.")
    if not slots.isdecimal() or int(slots) < 1:
      raise InputError(f"{place}: {word!r}; a whole number from 1 on is needed.")
  port = None if match["port"] is None else int(match["port"])
  if port is not None and not 0 < port < 65536:
    raise InputError(f"{place}: {port} is no port.")
  return Host(match["ipv6"] or match["host"], match["user"], port, int(slots))
