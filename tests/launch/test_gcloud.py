"""The commands of launch.gcloud through Google's own gcloud, before a stand-in of Google's servers.

gcloud itself is real here; what answers it is this file, on this machine, and its token is none.
"""

import http.server
import json
import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from launch.gcloud import Gcloud

CLOUD = Gcloud("run", 2, "us-a", "ours", False, 0.01)
NODE = {
  "name": "projects/ours/locations/us-a/nodes/run-0",
  "state": "READY",
  "networkEndpoints": [{"accessConfig": {"externalIp": f"127.0.0.{n}"}} for n in (5, 6)],
}


class Server(http.server.ThreadingHTTPServer):
  """Answers the TPU and Compute APIs, and keeps what was asked."""

  def __init__(self):
    super().__init__(("127.0.0.1", 0), Handler)
    self.asked: list[tuple[str, str, dict]] = []


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
    path = self.path.partition("?")[0]
    self.server.asked.append((self.command, self.path, json.loads(body or "{}")))
    answer: dict = {"name": path.removeprefix("/v2/"), "state": {"state": "ACTIVE"}}
    if "/operations/" in path:
      answer = {"name": answer["name"], "done": True, "response": {}}
    elif path.endswith("/nodes/run-0"):
      answer = NODE
    elif "/nodes/" in path or "/compute/" in path:
      answer = {}
    elif self.command in ("POST", "DELETE"):
      answer = {"name": "projects/ours/locations/us-a/operations/1", "done": False}
    text = json.dumps(answer).encode()
    self.send_response(200)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(text)))
    self.end_headers()
    self.wfile.write(text)

  do_POST = do_DELETE = do_GET

  def log_message(self, *_):
    pass


@pytest.fixture(scope="module")
def server():
  with Server() as made:
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture
def gcloud(server, tmp_path):
  """Runs a command; what it prints. Nothing of it leaves this machine."""
  if shutil.which("gcloud") is None:
    pytest.skip("gcloud is not installed")
  (tmp_path / "token").write_text("no token")
  address = f"http://127.0.0.1:{server.server_port}"
  values = {
    "HOME": str(tmp_path),
    "CLOUDSDK_CONFIG": str(tmp_path / "config"),
    "CLOUDSDK_AUTH_ACCESS_TOKEN_FILE": str(tmp_path / "token"),
    "CLOUDSDK_API_ENDPOINT_OVERRIDES_TPU": f"{address}/",
    "CLOUDSDK_API_ENDPOINT_OVERRIDES_COMPUTE": f"{address}/compute/v1/",
    "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
    "CLOUDSDK_CORE_DISABLE_USAGE_REPORTING": "true",
    "CLOUDSDK_COMPONENT_MANAGER_DISABLE_UPDATE_CHECK": "true",
  }
  server.asked.clear()

  def run(words: list[str]) -> str:
    environment = {**os.environ, **values}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


@pytest.mark.slow
def test_a_request_for_spot_slices_has_what_was_asked_for(gcloud, server):
  gcloud(CLOUD.create("v5p-128", "v2-alpha-tpuv5", ["--spot"]))
  command, path, body = server.asked[0]
  assert (command, path.partition("?")[0]) == (
    "POST", "/v2/projects/ours/locations/us-a/queuedResources",
  )  # fmt: skip
  assert "queuedResourceId=run" in path
  assert body["spot"] == {}
  (spec,) = body["tpu"]["nodeSpec"]
  assert spec["multisliceParams"] == {"nodeCount": 2, "nodeIdPrefix": "run"}
  assert spec["node"]["acceleratorType"] == "v5p-128"
  assert spec["node"]["runtimeVersion"] == "v2-alpha-tpuv5"


@pytest.mark.slow
def test_a_request_for_one_slice_names_its_node_and_its_addresses(gcloud, server):
  one = Gcloud("run", 1, "us-a", "ours", True, 0.01)
  gcloud(one.create("v6e-16", "v2-alpha-tpuv6e", []))
  (spec,) = server.asked[0][2]["tpu"]["nodeSpec"]
  assert spec["nodeId"] == "run"
  assert not spec["node"]["networkConfig"].get("enableExternalIps", False)


@pytest.mark.slow
def test_looking_and_deleting_ask_for_the_same_request_and_node(gcloud, server):
  assert json.loads(gcloud(CLOUD.describe()))["state"] == {"state": "ACTIVE"}
  seen = json.loads(gcloud(CLOUD.describe_node("run-0")))
  assert (seen["state"], len(seen["networkEndpoints"])) == ("READY", 2)
  gcloud(CLOUD.delete())
  place = "/v2/projects/ours/locations/us-a"
  asked = [(command, path.partition("?")[0]) for command, path, _ in server.asked]
  assert asked[:3] == [
    ("GET", f"{place}/queuedResources/run"), ("GET", f"{place}/nodes/run-0"),
    ("DELETE", f"{place}/queuedResources/run"),
  ]  # fmt: skip
  assert "force=True" in server.asked[2][1]


@pytest.mark.slow
def test_every_worker_gets_the_command_word_for_word(gcloud, tmp_path):
  command = "cd run && python3 -m launch.worker follow 0123 \"$(hostname)\" 'it'"
  shown = gcloud([*CLOUD.ssh("run-0", command), "--dry-run"]).splitlines()
  lines = [line for line in shown if "@127" in line]  # gcloud may make a key first, and says so.
  for host, line in zip(("127.0.0.5", "127.0.0.6"), lines, strict=True):
    assert line.endswith(f"@{host} -- {command}")
    assert "-o ServerAliveInterval=15 -o ServerAliveCountMax=4" in line
  archive = tmp_path / "run.tar.gz"
  archive.touch()
  lines = gcloud([*CLOUD.copy(str(archive), "run-0", archive.name), "--dry-run"]).splitlines()
  for host, line in zip(("127.0.0.5", "127.0.0.6"), lines, strict=True):
    assert line.endswith(f"@{host}:{Path(archive.name)}")
