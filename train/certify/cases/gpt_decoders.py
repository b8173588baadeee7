"""GPT-2 and those that came before Llama."""

GPT2 = dict(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=640)
CASES = {
  "gpt2": ("GPT2LMHeadModel", GPT2),
  "gpt2, labels": ("GPT2ForTokenClassification", {**GPT2, "num_labels": 3}),
}  # fmt: skip
