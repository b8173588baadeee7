"""`--target=kubernetes`: a JobSet on TPU slices, GPU nodes or plain ones."""

import dataclasses
import re
import signal
from typing import Any

import yaml

from launch import kubectl, slices
from launch.job import FINAL, Job, process_environment
from launch.options import option
from launch.workdir import MOUNT, check_lasting, check_mount
from launch.xla_flags import xla_environment
from model.errors import DONE, InputError

UNREAD = ("processes", "backoff")  # A process on each host; JobSet starts again at once.
REPLICATED = "slice"  # Name of the jobs in a set, one for each slice.
CONTAINER = "run"
_PORT = 8482  # Of the coordinator; a pod has an address of its own.
_WRONG_INPUT = "wrongInput"
INTERRUPTED = 128 + signal.SIGINT  # The status of who stops reading along.
_BUCKET = "gcsfuse.csi.storage.gke.io"
_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|[KMGTPE]i|[MGTPE])?")
_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")


@dataclasses.dataclass(frozen=True)
class Options:
  """Flags of `--target=kubernetes`."""

  image: str | None = option(None, "Container image with this project and its dependencies.")
  topology: str | None = option(None, "TPU slice as in v5e:4x4 or v5p:2x2x4.")
  slices: int = option(1, "TPU slices.", at_least=1)
  chips_per_host: int | None = option(None, "Chips of a TPU host: 8 for v5e:2x4 and v6e:2x4.")
  nodes: int | None = option(None, "Nodes where there are no TPUs; left out, 1.", at_least=1)
  gpus_per_node: int | None = option(None, "GPUs of each node, all for one process.", at_least=1)
  cpu: str | None = option(None, "CPU cores that each pod asks for, for example 96.")
  memory: str | None = option(None, "Memory that each pod asks for, for example 400Gi.")
  pvc: str | None = option(None, "Persistent volume claim that is mounted at --mount.")
  bucket: str | None = option(None, "Cloud Storage bucket that is mounted at --mount (gcsfuse).")
  mount: str | None = option(
    None, "Where the volume is mounted; left out, /runs. --workdir has to be in it."
  )
  namespace: str = option("default", "Namespace.")
  context: str | None = option(None, "Context of kubectl; left out, the current one.")
  service_account: str | None = option(None, "Kubernetes service account of the pods.")
  queue: str | None = option(None, "Kueue's local queue.")
  priority_class: str | None = option(None, "Priority class of the pods.")
  node_selector: tuple[str, ...] = option(
    (), "KEY=VALUE of a node label, for example cloud.google.com/gke-accelerator=nvidia-h100-80gb."
  )
  spot: bool = option(False, "Spot nodes of GKE.")
  grace: float = option(120.0, "Seconds from SIGTERM to SIGKILL when a pod ends.", at_least=1)
  follow: bool = option(False, "Print the logs until the run has ended, with its exit status.")


def submit(job: Job, options: Options, dry_run: bool) -> int:
  """Writes the manifest into the log folder and creates it.

  Returns:
    0 once it is created; with `follow` the exit status of the run.

  Raises:
    InputError: for options that contradict each other, and in kubectl's own words where it fails.
  """
  made = job_set(job, options)
  manifest = yaml.safe_dump(made, sort_keys=False, width=1000)
  path = job.logs.absolute() / f"{job.name}.yaml"
  client = kubectl.Client(job.name, options.namespace, options.context)
  if dry_run:
    print(f"# {path}\n{manifest}# given to\n# {client.shown('create', '--filename=-')}")
    return DONE
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(manifest, encoding="utf-8")
  client.create(manifest)
  print(f"jobset {job.name} is created; manifest: {path}")
  print(f"to read along: {client.shown(*client.logs())}")
  print(f"to end it: {client.shown('delete', 'jobset', job.name)}")
  if not options.follow:
    return DONE
  try:
    hosts = made["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"]
    return kubectl.follow(client, path.with_suffix(".log"), options.slices * hosts)
  except KeyboardInterrupt:
    print(f"jobset {job.name} goes on", flush=True)
    return INTERRUPTED


def job_set(job: Job, options: Options) -> dict[str, Any]:
  """The JobSet (jobset.x-k8s.io/v1alpha2) as plain values.

  One job for each slice, in which each pod is a host. Any failure ends all jobs and starts all of
  them again, `max_restarts` times, except wrong input (status 2), which fails the set at once.
  """
  part = _slice(options)
  hosts = part.hosts if part else options.nodes or 1
  job = dataclasses.replace(job, processes=options.slices * hosts)
  _check_names(job, options)
  _check_length(job.name, options.slices, hosts)
  volume = "--pvc or --bucket"
  mount = check_mount(options.mount, options.bucket, options.pvc or options.bucket, volume)
  check_lasting(job, mount, volume)
  labels = {"kueue.x-k8s.io/queue-name": options.queue} if options.queue else {}
  annotations = {}
  if options.slices > 1:  # Pods of one job on one slice, of two jobs on two.
    annotations["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
  metadata = {"name": job.name, "namespace": options.namespace}
  metadata |= _given(labels=labels, annotations=annotations)
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "network": {"enableDNSHostnames": True, "subdomain": job.name},
      "failurePolicy": {
        "maxRestarts": job.max_restarts,
        # No pod of the attempt before may still write into the workdir.
        "restartStrategy": "BlockingRecreate",
        "rules": [
          {
            "name": _WRONG_INPUT,
            "action": "FailJobSet",
            "onJobFailureReasons": ["PodFailurePolicy"],
          }
        ],
      },
      "replicatedJobs": [
        {
          "name": REPLICATED,
          "replicas": options.slices,
          "template": {"spec": _job_spec(job, options, part, hosts)},
        }
      ],
    },
  }


def _job_spec(job: Job, options: Options, part: slices.Slice | None, hosts: int) -> dict[str, Any]:
  on_final = {"containerName": CONTAINER, "operator": "In", "values": list(FINAL)}
  pod = _given(annotations={"gke-gcsfuse/volumes": "true"} if options.bucket else {})
  return {
    "completionMode": "Indexed",
    "parallelism": hosts,
    "completions": hosts,
    "backoffLimit": 0,  # JobSet starts all pods again, never one.
    "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": on_final}]},
    "template": _given(metadata=pod) | {"spec": _pod_spec(job, options, part, hosts)},
  }


def _pod_spec(job: Job, options: Options, part: slices.Slice | None, hosts: int) -> dict[str, Any]:
  selector = _node_selector(options)
  tolerations = []
  if part:
    selector["cloud.google.com/gke-tpu-accelerator"] = part.accelerator
    selector["cloud.google.com/gke-tpu-topology"] = part.topology
  for key, wanted in (("google.com/tpu", part), ("nvidia.com/gpu", options.gpus_per_node)):
    if wanted:
      tolerations.append({"key": key, "operator": "Exists", "effect": "NoSchedule"})
  if options.spot:
    selector["cloud.google.com/gke-spot"] = "true"
    tolerations.append({"key": "cloud.google.com/gke-spot", "operator": "Exists"})
  volumes, mounts = _volumes(job, options)
  return {
    "restartPolicy": "Never",
    "terminationGracePeriodSeconds": round(options.grace),
    **_given(
      serviceAccountName=options.service_account,
      priorityClassName=options.priority_class,
      nodeSelector=selector,
      tolerations=tolerations,
      volumes=volumes,
    ),
    "containers": [_container(job, options, part, hosts) | _given(volumeMounts=mounts)],
  }


def _container(job: Job, options: Options, part: slices.Slice | None, hosts: int) -> dict[str, Any]:
  script = 'exec "$@"'
  if options.slices * hosts > 1:
    rank = f"$((JOB_INDEX * {hosts} + JOB_COMPLETION_INDEX))"  # Kubernetes sets the second one.
    script = f"export JAX_PROCESS_ID={rank}; {script}"
  devices = {"google.com/tpu": str(part.chips_per_host)} if part else {}
  if options.gpus_per_node:
    devices["nvidia.com/gpu"] = str(options.gpus_per_node)
  asked = _given(cpu=options.cpu, memory=options.memory) | devices
  return {
    "name": CONTAINER,
    "image": options.image,
    "command": ["/bin/sh", "-c", _literal(script), job.name],
    "args": [_literal(word) for word in job.argv()],
    **_given(
      env=_environment(job, options, part, hosts),
      resources=_given(requests=asked, limits=devices),
    ),
  }


def _environment(
  job: Job, options: Options, part: slices.Slice | None, hosts: int
) -> list[dict[str, Any]]:
  """Of the container: what the user gave wins.

  Several slices have libtpu's MEGASCALE_ variables; the first host of the first slice is process 0
  for JAX and the coordinator for libtpu, and processes are counted slice by slice, as both have it.
  """
  kind = "tpu" if part else "gpu" if options.gpus_per_node else "cpu"
  total = options.slices * hosts
  first = f"{job.name}-{REPLICATED}-0-0.{job.name}"
  texts = process_environment(f"{first}:{_PORT}", total, 0)
  texts.pop("JAX_PROCESS_ID", None)  # Of each pod: the script has it.
  entries: dict[str, dict[str, Any]] = {"JOB_INDEX": _job_index()} if total > 1 else {}
  if options.slices > 1:
    texts["MEGASCALE_COORDINATOR_ADDRESS"] = first
    texts["MEGASCALE_NUM_SLICES"] = str(options.slices)
    entries["MEGASCALE_SLICE_ID"] = _job_index()
  texts |= {**job.environment, **xla_environment(kind, job.environment, table=job.xla_table)}
  entries |= {name: {"value": _literal(value)} for name, value in texts.items()}
  return [{"name": name, **entry} for name, entry in entries.items()]


def _job_index() -> dict[str, Any]:
  """Which slice a pod is on."""
  place = "metadata.labels['jobset.sigs.k8s.io/job-index']"
  return {"valueFrom": {"fieldRef": {"fieldPath": place}}}


def _volumes(job: Job, options: Options) -> tuple[list[dict], list[dict]]:
  volumes, mounts = [], []
  if options.pvc:
    volumes.append({"name": "runs", "persistentVolumeClaim": {"claimName": options.pvc}})
  if options.bucket:
    attributes = {"bucketName": options.bucket, "mountOptions": "implicit-dirs"}
    volumes.append({"name": "runs", "csi": {"driver": _BUCKET, "volumeAttributes": attributes}})
  if volumes:
    mounts.append({"name": "runs", "mountPath": options.mount or MOUNT})
  if options.gpus_per_node:  # NCCL needs more shared memory than the 64 MiB that a pod has.
    volumes.append({"name": "shared-memory", "emptyDir": {"medium": "Memory"}})
    mounts.append({"name": "shared-memory", "mountPath": "/dev/shm"})
  return volumes, mounts


def _slice(options: Options) -> slices.Slice | None:
  if options.image is None:
    raise InputError("--image is needed: a container image with this project in it.")
  if options.pvc and options.bucket:
    raise InputError("--pvc and --bucket are both given: one volume is mounted.")
  if options.topology is None:
    if options.slices > 1 or options.chips_per_host is not None:
      raise InputError("--slices and --chips_per_host need --topology: only TPUs come in slices.")
    return None
  if options.nodes or options.gpus_per_node:
    raise InputError("--topology says how many TPU hosts there are: leave out --nodes and GPUs.")
  return slices.parse(options.topology, options.chips_per_host)


def _node_selector(options: Options) -> dict[str, str]:
  chosen: dict[str, str] = {}
  for word in options.node_selector:
    key, equals, value = word.partition("=")
    if not equals or not key or key in chosen:
      raise InputError(f"--node_selector={word}: KEY=VALUE is needed, each key once.")
    chosen[key] = value
  return chosen


def _check_names(job: Job, options: Options) -> None:
  if not job.name[0].isalpha():  # Also the name of a service.
    raise InputError(f"--name={job.name}: Kubernetes wants a letter at the start.")
  for name in ("namespace", "pvc", "queue", "service_account", "priority_class"):
    value = getattr(options, name)
    if value is not None and not _LABEL.fullmatch(value):
      raise InputError(
        f"--{name}={value}: a name is at most 63 lower-case letters, digits and dashes, with a "
        "letter or digit at both ends."
      )
  for name in ("cpu", "memory"):
    value = getattr(options, name)
    if value is not None and not _QUANTITY.fullmatch(value):
      raise InputError(
        f"--{name}={value}: a quantity of Kubernetes is needed, as 96, 500m or 400Gi."
      )


def _check_length(name: str, count: int, hosts: int) -> None:
  """As JobSet's webhook does: the last pod's name, with its random end, is a label of DNS."""
  longest = 63 - len(f"-{REPLICATED}-{count - 1}-{hosts - 1}-abcde")
  if len(name) > longest:
    raise InputError(
      f"--name={name}: names of pods begin with it, which leaves it at most {longest} characters "
      f"with {count} x {hosts} hosts, and it has {len(name)}. Give a shorter --name."
    )


def _literal(text: str) -> str:
  """Text that Kubernetes hands on as it is: it would take $(NAME) for a variable, and $$ for $."""
  return text.replace("$", "$$")


def _given(**values: Any) -> dict[str, Any]:
  return {name: value for name, value in values.items() if value}
