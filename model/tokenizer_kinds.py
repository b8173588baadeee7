"""What Transformers' tokenizer classes add to files: templates, special tokens, ways of cutting."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from model.errors import InputError

_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
_ROBERTA = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>",
            "cls": "<s>", "mask": "<mask>"}  # fmt: skip
_END = "<|endoftext|>"


@dataclasses.dataclass(frozen=True)
class Kind:
  """A tokenizer class.

  Attributes:
    name: without `Tokenizer`; '' where nothing names one.
    words, merges, pieces: whether it reads vocab.txt, vocab.json with merges.txt, a SentencePiece
      model.
    special: its special tokens, by role, where files name none.
    pair: what stands around texts: `bert` ([CLS] A [SEP] B [SEP]), `roberta` (<s> A </s></s> B
      </s>), `ends` (the beginning and the end, as the config asks for them).
    add_bos, add_eos: whether `ends` are put, where the config does not say it.
    typed: whether the second of two texts has a token type of its own between `ends`.
    sentinels: of T5, behind the model's pieces.
  """

  name: str
  words: bool = False
  merges: bool = False
  pieces: bool = False
  special: Mapping[str, str] = dataclasses.field(default_factory=dict)
  pair: str = "ends"
  add_bos: bool = False
  add_eos: bool = False
  typed: bool = True
  sentinels: int = 0

  @property
  def roles(self) -> dict[str, str]:
    """Special tokens as tokenizer_config.json names them."""
    return {f"{role}_token": token for role, token in self.special.items()}


UNNAMED = Kind("", words=True, merges=True, pieces=True, add_bos=True, add_eos=True)
BERT = Kind("Bert", words=True, special=_BERT, pair="bert")
GPT2 = Kind("GPT2", merges=True, special={"bos": _END, "eos": _END, "unk": _END})
_KINDS = (
  BERT,
  GPT2,
  Kind("MPNet", words=True, special=_ROBERTA | {"unk": "[UNK]"}, pair="roberta"),
  Kind("Qwen2", merges=True, special={"eos": _END, "pad": _END, "unk": _END}),
  Kind("Roberta", merges=True, special=_ROBERTA, pair="roberta"),
  Kind("Llama", pieces=True, special={"bos": "<s>", "eos": "</s>", "unk": "<unk>"}, add_bos=True),
  Kind("Gemma", pieces=True, special={r: f"<{r}>" for r in ("bos", "eos", "unk", "pad", "mask")},
       add_bos=True),
  Kind("T5", pieces=True, special={"eos": "</s>", "unk": "<unk>", "pad": "<pad>"}, add_eos=True,
       typed=False, sentinels=100),
)  # fmt: skip
_SAME = {
  "Bert": ("DistilBert", "Electra", "MobileBert", "ConvBert", "SqueezeBert", "LayoutLM"),
  "Roberta": ("Bart", "Longformer", "LED"), "T5": ("MT5",),
}  # fmt: skip
_OF_NAME = {kind.name: kind for kind in _KINDS}
_OF_NAME |= {name: _OF_NAME[kind] for kind, names in _SAME.items() for name in names}
# Where neither tokenizer_config.json nor config.json names a class, the model's kind does.
_OF_MODEL = {
  "bert": "Bert", "distilbert": "Bert", "electra": "Bert", "mobilebert": "Bert", "mpnet": "MPNet",
  "convbert": "Bert", "squeezebert": "Bert", "layoutlm": "Bert", "gpt2": "GPT2", "gptj": "GPT2",
  "gpt_neo": "GPT2", "opt": "GPT2", "phi": "GPT2", "qwen2": "Qwen2", "qwen3": "Qwen2",
  "qwen2_moe": "Qwen2", "qwen3_moe": "Qwen2", "roberta": "Roberta", "bart": "Roberta",
  "longformer": "Roberta", "led": "Roberta", "llama": "Llama", "mistral": "Llama",
  "mixtral": "Llama", "phi3": "Llama", "gemma": "Gemma", "gemma2": "Gemma", "gemma3": "Gemma",
  "gemma3_text": "Gemma", "t5": "T5", "mt5": "T5", "xlm-roberta": "XLMRoberta", "mbart": "MBart",
  "albert": "Albert", "deberta": "Deberta", "deberta-v2": "DebertaV2", "marian": "Marian",
  "pegasus": "Pegasus", "m2m_100": "M2M100", "camembert": "Camembert", "xlnet": "XLNet",
}  # fmt: skip


def kind_of(config: Mapping[str, Any], model: Mapping[str, Any]) -> Kind:
  """The class that a folder names, or that its model has; a kind of no name if there is none.

  Args:
    config: fields of tokenizer_config.json.
    model: fields of config.json.
  """
  named = config.get("tokenizer_class") or model.get("tokenizer_class") or ""
  name = str(named).removesuffix("Fast").removesuffix("Tokenizer")
  if name in ("", "PreTrained", "TokenizersBackend"):
    name = _OF_MODEL.get(str(model.get("model_type")), "") if not named else ""
  return _OF_NAME.get(name, Kind(name) if name else UNNAMED)


def check_reads(kind: Kind, what: str, reads: bool) -> None:
  """Raises an InputError if a class does not make what it needs of such a file."""
  if not reads:
    raise InputError(
      f"{what} is read in a way of its own by {kind.name}Tokenizer, which is not known here: open "
      "the folder with Transformers' AutoTokenizer and save it, which writes tokenizer.json."
    )
