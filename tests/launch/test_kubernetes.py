"""`--target=kubernetes`: the manifest against the published schema, and what a pod makes of it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch import kubectl, kubernetes, slices
from launch.job import Job
from model.errors import InputError
from tests import weights

SCHEMA = "kubeflow-trainer-api==2.3.0"  # Models made from the OpenAPI of JobSet and Kubernetes.
CASES = {
  "two slices": dict(topology="v5p:2x2x4", slices=2, bucket="runs-of-us", spot=True),
  "one host": dict(topology="v5e:2x4", chips_per_host=8, pvc="runs", queue="research"),
  "gpu nodes": dict(
    nodes=3, gpus_per_node=8, pvc="runs", cpu="96", memory="900Gi", service_account="trainer",
    priority_class="high", node_selector=("cloud.google.com/gke-accelerator=nvidia-h100-80gb",),
  ),
  "plain nodes": dict(nodes=2, pvc="runs", namespace="research", grace=30),
}  # fmt: skip


def a_job(*arguments: str, **changes) -> Job:
  settings = dict(command=("train", "--workdir=/runs/a", *arguments), name="run", processes=None)
  settings |= dict(environment={}, max_restarts=3, backoff=1.0, logs=Path("logs"))
  return Job(**{**settings, **changes})


def manifest(job: Job, **options) -> dict:
  chosen = kubernetes.Options(**{"image": "registry.example/triune:1", **options})
  return yaml.safe_load(yaml.safe_dump(kubernetes.job_set(job, chosen)))


def container(made: dict) -> dict:
  return pod(made)["containers"][0]


def pod(made: dict) -> dict:
  return job_spec(made)["template"]["spec"]


def job_spec(made: dict) -> dict:
  return made["spec"]["replicatedJobs"][0]["template"]["spec"]


@pytest.fixture(scope="module")
def published():
  """JobSet as its publisher has it: a class that reads a manifest and keeps what it knows of."""
  pytest.importorskip("pydantic")
  sys.path.insert(0, str(weights.fetch(SCHEMA)))
  try:
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet
  finally:
    sys.path.pop(0)
  return JobsetV1alpha2JobSet


@pytest.mark.parametrize("case", CASES)
def test_the_published_schema_knows_every_field_and_value(published, case):
  made = manifest(a_job(environment={"A": "1"}), **CASES[case])
  assert published.from_dict(made).to_dict() == made  # It leaves out what it does not know.


@pytest.mark.parametrize(
  "path",
  [
    ("spec", "failurePolicy", "maxRestart"),
    ("spec", "network", "subDomain"),
    ("spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rule"),
    ("spec", "replicatedJobs", 0, "template", "spec", "template", "spec", "tolerations", 0, "x"),
  ],
)
def test_that_comparison_sees_a_field_that_does_not_exist(published, path):
  made = manifest(a_job(), **CASES["two slices"])
  place = made
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = 1
  assert published.from_dict(made).to_dict() != made


def test_the_schema_has_the_action_that_ends_a_set_at_once(published):
  policy = published.model_fields["spec"].annotation.__args__[0].model_fields["failure_policy"]
  rule = policy.annotation.__args__[0].model_fields["rules"].annotation.__args__[0].__args__[0]
  made = manifest(a_job(), **CASES["gpu nodes"])["spec"]["failurePolicy"]["rules"][0]
  assert made["action"] in rule.model_fields["action"].description


def test_that_comparison_sees_a_value_of_another_kind(published):
  made = manifest(a_job(), **CASES["two slices"])
  made["spec"]["failurePolicy"]["maxRestarts"] = "three"
  with pytest.raises(ValueError, match="maxRestarts"):
    published.from_dict(made)


def expanded(text: str, environment: dict[str, str]) -> str:
  """What Kubernetes makes of $(NAME) and $$ in a container's words and values."""
  known = lambda name: environment.get(name, f"$({name})")
  return re.sub(r"\$(\$|\(([^)]*)\))", lambda m: "$" if m[1] == "$" else known(m[2]), text)


def test_pods_run_the_words_as_given_and_count_through_slices(tmp_path):
  """Each pod's command is run by a shell, with what Kubernetes would set."""
  program = tmp_path / "python"
  program.write_text(
    f"#!{sys.executable}\nimport json, os, sys\nprint(json.dumps([sys.argv, dict(os.environ)]))\n"
  )
  program.chmod(0o755)
  odd = "a 'b' \"c\" $(d) $(JOB_INDEX) $$ `e` \\ $"
  made = container(manifest(a_job(odd, environment={"ODD": odd}), **CASES["two slices"]))
  ranks = []
  for index in range(2):
    for completion in range(4):
      values = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": str(completion)}
      for entry in made["env"]:
        label = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        assert "value" in entry or label == "metadata.labels['jobset.sigs.k8s.io/job-index']"
        values[entry["name"]] = expanded(entry["value"], values) if "value" in entry else str(index)
      words = [expanded(word, values) for word in (*made["command"], *made["args"])]
      done = subprocess.run(words, env=values, capture_output=True, text=True, check=True)
      argv, seen = json.loads(done.stdout)
      assert argv[1:] == ["-m", "train", "--workdir=/runs/a", odd]
      assert seen["ODD"] == odd
      assert seen["JAX_COORDINATOR_ADDRESS"] == "run-slice-0-0.run:8482"
      assert seen["MEGASCALE_COORDINATOR_ADDRESS"] == "run-slice-0-0.run"
      assert (seen["MEGASCALE_NUM_SLICES"], seen["MEGASCALE_SLICE_ID"]) == ("2", str(index))
      assert seen["JAX_NUM_PROCESSES"] == "8"
      ranks.append(int(seen["JAX_PROCESS_ID"]))
  assert ranks == list(range(8))


def test_hosts_chips_and_restarts_are_where_kubernetes_looks_for_them():
  made = manifest(a_job(), **CASES["two slices"])
  replicated = made["spec"]["replicatedJobs"][0]
  assert (replicated["replicas"], job_spec(made)["completions"]) == (2, 4)
  assert container(made)["resources"]["limits"] == {"google.com/tpu": "4"}
  assert pod(made)["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "2x2x4"
  assert made["spec"]["failurePolicy"]["maxRestarts"] == 3
  rule = job_spec(made)["podFailurePolicy"]["rules"][0]
  assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
  assert re.fullmatch(
    "[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", made["spec"]["failurePolicy"]["rules"][0]["name"]
  )
  single = container(manifest(a_job(), **CASES["one host"]))
  assert single["resources"]["limits"] == {"google.com/tpu": "8"}
  names = [entry["name"] for entry in single["env"]]
  assert names == ["LIBTPU_INIT_ARGS"]  # One process has nobody to meet.
  assert container(manifest(a_job(), **CASES["gpu nodes"]))["resources"] == {
    "requests": {"cpu": "96", "memory": "900Gi", "nvidia.com/gpu": "8"},
    "limits": {"nvidia.com/gpu": "8"},
  }


@pytest.mark.parametrize(
  ("options", "pod"),
  [({}, "-slice-0-0"), (dict(topology="v5p:16x16x16", slices=99), "-slice-98-1023")],
)
def test_names_of_pods_fit_into_dns_as_jobset_checks_it(options, pod):
  longest = 63 - len(f"{pod}-abcde")  # What it adds to the last pod's name.
  made = manifest(a_job(name="x" * longest), pvc="p", **options)
  hosts, count = job_spec(made)["completions"], made["spec"]["replicatedJobs"][0]["replicas"]
  assert pod == f"-{kubernetes.REPLICATED}-{count - 1}-{hosts - 1}"
  with pytest.raises(InputError, match=f"at most {longest} characters"):
    manifest(a_job(name="x" * (longest + 1)), pvc="p", **options)


@pytest.mark.parametrize(
  ("options", "job", "message"),
  [
    (dict(image=None), {}, "--image is needed"),
    (dict(pvc=None), {}, "mounts what lasts"),
    (dict(bucket="b"), {}, "one volume is mounted"),
    (dict(slices=2), {}, "--slices and --chips_per_host need --topology"),
    (dict(topology="v5e:4x4", gpus_per_node=1), {}, "leave out --nodes and GPUs"),
    (dict(topology="v5e:4x4x4"), {}, "v5e has 1x1"),
    (dict(topology="v5p:4x4"), {}, "multiples of 4"),
    (dict(topology="v5p:8x4x4"), {}, "ascending"),
    (dict(topology="v5q:4x4"), {}, "Did you mean 'v5[ep]'"),
    (dict(topology="v5e:4x4", chips_per_host=8), {}, "comes with 4 on each host"),
    (dict(chips_per_host=4), {}, "--slices and --chips_per_host need --topology"),
    (dict(pvc=None, mount="/x"), dict(command=("infer",)), "--mount=/x has no effect"),
    (dict(mount="x"), {}, "an absolute path"),
    (dict(pvc=None, bucket="gs://b"), {}, "without gs://"),
    (dict(memory="400 GB"), {}, "a quantity of Kubernetes"),
    (dict(namespace="Not_a_name"), {}, "--namespace=Not_a_name"),
    (dict(node_selector=("a",)), {}, "KEY=VALUE"),
    ({}, dict(name="1st"), "letter at the start"),
    ({}, dict(command=("train", "--workdir=runs/a")), "use --workdir=/runs/run"),
    ({}, dict(command=("train", "--workdir=/runs/../a")), "use --workdir=/runs/run"),
    ({}, dict(command=("train", "--workdir", "/tmp/a")), "--workdir=/tmp/a is lost"),
    (dict(nodes=2), dict(command=("infer",)), "not shared out"),
  ],
)
def test_what_cannot_be_is_refused(options, job, message):
  with pytest.raises(InputError, match=message):
    manifest(a_job(**job), **{"pvc": "runs", **options})


@pytest.mark.parametrize(
  ("topology", "hosts", "kind"),
  [("v5e:16x16", 64, "v5litepod-256"), ("v5p:4x4x4", 16, "v5p-128"), ("v4:4x8x8", 64, "v4-512"),
   ("v6e:4x4", 4, "v6e-16"), ("v5p:2x2x1", 1, "v5p-8"), ("v5p:8x16x16", 512, "v5p-4096")],
)  # fmt: skip
def test_topologies_have_hosts_and_the_name_that_cloud_tpu_gives_them(topology, hosts, kind):
  part = slices.parse(topology)
  assert (part.hosts, part.accelerator_type) == (hosts, kind)


def test_a_topology_that_cloud_tpu_would_shape_otherwise_is_refused():
  with pytest.raises(InputError, match="gives v5p-512 the topology 4x8x8, not 4x4x16"):
    _ = slices.parse("v5p:4x4x16").accelerator_type


# In the place of kubectl, with a cluster of one JobSet that is restarted once.
KUBECTL = """
import json, os, pathlib, sys
state = pathlib.Path(os.environ["STATE"])
words = [w for w in sys.argv[1:] if not w.startswith(("--namespace=", "--context="))]
seen = json.loads(state.read_text()) if state.exists() else {"manifest": None, "logs": 0}
if words[0] == "create":
  if seen["manifest"]:
    sys.exit("Error from server (AlreadyExists): jobsets.jobset.x-k8s.io \\"run\\" already exists")
  seen["manifest"] = sys.stdin.read()
elif words[:2] == ["get", "jobset"]:
  restarts = min(seen["logs"], 1)
  end = {"terminalState": os.environ["END"]} if seen["logs"] == 2 else {}
  print(json.dumps({"status": {"restarts": restarts, **end}}))
elif words[:2] == ["get", "pods"]:
  seen["looks"] = seen.get("looks", 0) + 1
  ended = {"phase": "Failed", "containerStatuses": [{"state": {"terminated": {"exitCode": 2}}}]}
  count = 1 if seen["looks"] == 1 else 2
  print(json.dumps({"items": [{"status": ended}] * count}))
elif words[0] == "logs":
  if seen["looks"] < 2:
    sys.exit("only one of two pods is there")
  print(words[-1])
  seen["logs"] += 1
else:
  sys.exit(f"unknown: {words}")
state.write_text(json.dumps(seen))
"""


@pytest.mark.parametrize(("end", "status"), [("Completed", 0), ("Failed", 2)])
def test_the_logs_of_every_attempt_are_printed_and_the_status_handed_on(
  tmp_path, monkeypatch, capsys, end, status
):
  """kubectl is a stand-in here."""
  program = tmp_path / "kubectl"
  program.write_text(f"#!{sys.executable}\n{KUBECTL}")
  program.chmod(0o755)
  monkeypatch.setattr(kubectl, "_POLL", 0.01)
  for name, value in dict(PATH=str(tmp_path), STATE=str(tmp_path / "state"), END=end).items():
    monkeypatch.setenv(name, value)
  job = a_job(logs=tmp_path / "logs")
  options = kubernetes.Options(image="i", pvc="runs", nodes=2, follow=True)
  assert kubernetes.submit(job, options, dry_run=False) == status
  out = capsys.readouterr().out
  assert "restart-attempt=0" in out
  assert "restart-attempt=1" in out
  assert f"{end} after 1 restarts" in out
  given = json.loads((tmp_path / "state").read_text())["manifest"]
  assert given == (tmp_path / "logs" / "run.yaml").read_text()
  assert yaml.safe_load(given) == kubernetes.job_set(job, options)
  with pytest.raises(InputError, match="there is a jobset run already"):
    kubernetes.submit(job, options, dry_run=False)


def test_without_kubectl_one_line_says_so(tmp_path, monkeypatch):
  monkeypatch.setenv("PATH", str(tmp_path))
  with pytest.raises(InputError, match="kubectl is not installed here"):
    kubernetes.submit(a_job(logs=tmp_path), kubernetes.Options(image="i", pvc="p"), dry_run=False)
