"""Which task a model's head serves."""

from model.config import ModelConfig
from model.errors import InputError

TASKS = {
  "language": "generate",
  "masked_lm": "fill-mask",
  "sequence": "classify",
  "token": "tag",
  "span": "answer",
  "embedding": "embed",
}


def check_head(cfg: ModelConfig, task: str) -> None:
  """Raises an InputError that names the task of this model's head, if that is not `task`."""
  fitting = TASKS.get(cfg.head_kind, "embed")  # Hidden states can be had of every model.
  if fitting != task:
    function = "m.embed" if fitting == "embed" else f"infer.{fitting.replace('-', '_')}"
    raise InputError(
      f"this model ({cfg.shape}, head {cfg.head_kind!r}) cannot {task}: use --task={fitting} "
      f"({function})."
    )
