"""Hosts on one machine: network namespaces with names, addresses and an sshd of their own."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

NETWORK = "10.77.63"  # Only inside the namespaces.


def sshd_path() -> str:
  """The ssh server, installed if need be; skips the test where that cannot be had."""
  if sys.platform != "linux" or os.geteuid() != 0:
    pytest.skip("network namespaces need Linux and root")
  if shutil.which("ip") is None:
    pytest.skip("`ip` (iproute2) is not installed")
  probe = subprocess.run(["ip", "netns", "add", f"probe{os.getpid()}"], capture_output=True)
  if probe.returncode:
    pytest.skip(f"no network namespaces here: {probe.stderr.decode().strip()}")
  subprocess.run(["ip", "netns", "del", f"probe{os.getpid()}"], check=True)
  found = shutil.which("sshd") or shutil.which("sshd", path="/usr/sbin")
  if found is None and shutil.which("apt-get"):
    install = ["apt-get", "install", "-y", "openssh-server", "openssh-client"]
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    subprocess.run(install, capture_output=True, env=quiet, timeout=300)
    found = shutil.which("sshd", path="/usr/sbin")
  if found is None or shutil.which("ssh") is None:
    pytest.skip("openssh is not installed and could not be")
  return found


class Network:
  """`count` hosts node1 …, and a hub from which they are reached; all of it is one bridge."""

  def __init__(self, folder: Path, count: int, sshd: str):
    self.folder, self._sshd, self._servers = folder, sshd, []
    self.names = [f"node{n}" for n in range(1, count + 1)]
    self._spaces = {name: f"triune{os.getpid()}{name}" for name in ["hub", *self.names]}
    self._tables = "127.0.0.1 localhost\n" + "".join(
      f"{NETWORK}.{n} {name}\n" for n, name in enumerate(["hub", *self.names], start=1)
    )

  def __enter__(self) -> "Network":
    with contextlib.ExitStack() as stack:
      stack.callback(self.close)
      self._keys()
      for n, name in enumerate(self._spaces, start=1):
        self._join(name, n)
      for name in self.names:
        self._serve(name)
      stack.pop_all()
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def close(self) -> None:
    """Ends what runs in the namespaces, and removes them."""
    for name, space in self._spaces.items():
      for pid in self.pids(name):
        with contextlib.suppress(ProcessLookupError):
          os.kill(pid, signal.SIGKILL)
      subprocess.run(["ip", "netns", "del", space], capture_output=True)
      shutil.rmtree(Path("/etc/netns") / space, ignore_errors=True)
    for server in self._servers:
      server.wait()

  def inside(self, name: str) -> list[str]:
    """Words that put a command on a host."""
    return ["ip", "netns", "exec", self._spaces[name]]

  def pids(self, name: str, of: str = "") -> list[int]:
    """Processes of a host whose command line contains `of`."""
    listed = subprocess.run(["ip", "netns", "pids", self._spaces[name]], capture_output=True)
    found = []
    for pid in map(int, listed.stdout.split()):
      with contextlib.suppress(OSError):
        if of in Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode():
          found.append(pid)
    return found

  def link(self, name: str, state: str) -> None:
    """Sets a host's cable "up" or "down"."""
    _run(*self.inside("hub"), "ip", "link", "set", f"to{name}", state)

  @property
  def client_options(self) -> list[str]:
    """Flags of the launcher with which its ssh client knows these hosts."""
    known = [f"UserKnownHostsFile={self.folder / 'known_hosts'}", "IdentitiesOnly=yes",
             f"IdentityFile={self.folder / 'user_key'}", "StrictHostKeyChecking=yes"]  # fmt: skip
    return [f"--ssh_option={option}" for option in known]

  def _keys(self) -> None:
    for name in ("host_key", "user_key"):
      _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
    host = (self.folder / "host_key.pub").read_text().split()[:2]
    lines = [f"{name},{NETWORK}.* {' '.join(host)}\n" for name in self.names]
    (self.folder / "known_hosts").write_text("".join(lines))
    shutil.copy(self.folder / "user_key.pub", self.folder / "authorized")

  def _join(self, name: str, number: int) -> None:
    space = self._spaces[name]
    own = Path("/etc/netns") / space  # `ip netns exec` lays it over /etc.
    own.mkdir(parents=True)
    (own / "hosts").write_text(self._tables)
    _run("ip", "netns", "add", space)
    inside = self.inside(name)
    _run(*inside, "ip", "link", "set", "lo", "up")
    if name == "hub":
      _run(*inside, "ip", "link", "add", "bridge", "type", "bridge")
      device = "bridge"
    else:
      hub, device = self.inside("hub"), "eth0"
      _run(*hub, "ip", "link", "add", f"to{name}", "type", "veth", "peer", "name", "eth0",
           "netns", space)  # fmt: skip
      _run(*hub, "ip", "link", "set", f"to{name}", "master", "bridge", "up")
    _run(*inside, "ip", "address", "add", f"{NETWORK}.{number}/24", "dev", device)
    _run(*inside, "ip", "link", "set", device, "up")

  def _serve(self, name: str) -> None:
    settings = self.folder / f"sshd_{name}"
    settings.write_text(
      f"HostKey {self.folder / 'host_key'}\nAuthorizedKeysFile {self.folder / 'authorized'}\n"
      "StrictModes no\nUsePAM no\nPermitRootLogin yes\nPidFile none\nPasswordAuthentication no\n"
    )
    Path("/run/sshd").mkdir(exist_ok=True)
    start = f"hostname {name} && exec {self._sshd} -D -e -f {settings}"
    with (self.folder / f"sshd_{name}.log").open("wb") as log:
      self._servers.append(
        subprocess.Popen([*self.inside(name), "unshare", "--uts", "sh", "-c", start], stderr=log)
      )
    deadline = time.monotonic() + 30
    while b"listening" not in (self.folder / f"sshd_{name}.log").read_bytes():
      if time.monotonic() > deadline:
        raise TimeoutError(f"sshd of {name} did not start")
      time.sleep(0.05)


def _run(*words: str) -> None:
  subprocess.run(words, check=True, capture_output=True)
