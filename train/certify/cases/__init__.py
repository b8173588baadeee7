"""What a certificate tries: classes of Transformers, and fields of their configs.

A name is a family's `model_type`, then what is special; the first of a family is tried by the tests
of every day, the others on request.
"""

from train.certify.cases import (
  deberta,
  decoders,
  encoder_decoders,
  encoders,
  expert_decoders,
  gpt_decoders,
  latent_decoders,
)

Case = tuple[str, dict]
CASES: dict[str, Case] = {
  **decoders.CASES,
  **gpt_decoders.CASES,
  **expert_decoders.CASES,
  **latent_decoders.CASES,
  **encoders.CASES,
  **deberta.CASES,
  **encoder_decoders.CASES,
}


def family_of(name: str) -> str:
  """The `model_type` in the name of a case."""
  return name.split(",")[0]


FAMILIES = tuple(dict.fromkeys(map(family_of, CASES)))
