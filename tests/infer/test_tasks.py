"""What models with other heads say of texts, and of which characters: equal to Transformers."""

import dataclasses
import re

import jax
import numpy as np
import pytest

import infer
from infer.heads import check_head
from infer.tasks.answer import best_span
from infer.tasks.tag import joined
from infer.tasks.words import word_pieces
from model.heads import init_params
from model.trained import Model
from model.vocabulary import build_tokenizer
from tests.infer.copies import BASE, BERT, VOCAB, theirs_and_ours

CORPUS = ["Zoë and Bob went to Köln on a boat. Bob met Zoë at 10: fine, no?"] * 4
TEXTS = ["Zoë met Bob.", "Bob went to Köln, fine: a boat on a boat", "no", "Köln 😀 e\u0301 10?"]
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
LONG = " ".join(CORPUS[0].split() * 12)


def tokenizer():
  return build_tokenizer("wordpiece", VOCAB, CORPUS)


def ours(labels=None, **changes) -> Model:
  """A random BERT with a tokenizer."""
  cfg = dataclasses.replace(BASE, **BERT | dict(init_std=0.4) | changes)
  return Model(cfg, init_params(cfg, jax.random.key(0)), tokenizer(), labels)


def copied(name: str, labels=None):
  """(Transformers' model, ours with its weights and a tokenizer)."""
  theirs, m = theirs_and_ours(name)
  return theirs, dataclasses.replace(m, tokenizer=tokenizer(), labels=labels)


def logits_of(theirs, m, text: str, pair: str | None = None):
  """Transformers' output for one text, or a pair of texts, by itself."""
  import torch

  row = m.tokenizer.encode_pairs([text], None if pair is None else [pair])[0]
  with torch.no_grad():
    return theirs(torch.tensor([row.ids]), token_type_ids=torch.tensor([row.types])), row


def test_masks_are_filled_with_the_tokens_of_transformers_alone_and_in_a_batch():
  theirs, m = copied("BertForMaskedLM")
  texts = ["Bob [MASK] to Köln", "[MASK] and [MASK] met.", "[MASK]", "a [MASK]" * 11]
  together = infer.fill_mask(m, texts, top=4)
  assert [len(masks) for masks in together] == [1, 2, 1, 11]
  for text, masks in zip(texts, together, strict=True):
    output, row = logits_of(theirs, m, text)
    want = output.logits[0].softmax(-1)[np.array(row.ids) == m.tokenizer.mask_id].topk(4)
    assert [[g.token for g in guesses] for guesses in masks] == want.indices.tolist()
    got = [[g.probability for g in guesses] for guesses in masks]
    np.testing.assert_allclose(got, want.values, atol=1e-5)
    assert all(m.tokenizer.backend.decode([g.token]) == g.text for one in masks for g in one
               if g.token not in m.tokenizer.special_ids)  # fmt: skip
    assert [[g.token for g in one] for one in infer.fill_mask(m, text, top=4)[0]] == [
      [g.token for g in one] for one in masks
    ]


@pytest.mark.parametrize("problem", ["single_label", "multi_label", "regression"])
def test_scores_of_labels_equal_transformers_for_texts_and_pairs(problem):
  theirs, m = copied("BertForSequenceClassification", ("no", "maybe", "yes"))
  if problem == "multi_label":
    m = dataclasses.replace(m, config=dataclasses.replace(m.config, problem=problem))
  if problem == "regression":  # One of the three outputs.
    head = dict(m.params["head"], proj=jax.tree.map(lambda a: a[..., :1], m.params["head"]["proj"]))
    cfg = dataclasses.replace(m.config, problem=problem, num_labels=None)
    m = Model(cfg, {**m.params, "head": head}, m.tokenizer)
  told = dict(single_label=lambda x: x.softmax(-1), multi_label=lambda x: x.sigmoid(),
              regression=lambda x: x[:1])[problem]  # fmt: skip
  for pairs in (None, TEXTS[::-1]):
    for i, labels in enumerate(infer.classify(m, TEXTS, pairs)):
      output, _ = logits_of(theirs, m, TEXTS[i], pairs and pairs[i])
      want = told(output.logits[0]).tolist()
      assert [label.score for label in labels] == sorted((x.score for x in labels), reverse=True)
      scores = {label.label: label.score for label in labels}
      names = ("no", "maybe", "yes") if len(want) == 3 else ("value",)
      np.testing.assert_allclose([scores[n] for n in names], want, atol=1e-5)


def test_spans_equal_those_of_the_pipeline_of_transformers(tmp_path):
  theirs, m = copied("BertForTokenClassification", TAGS)
  from transformers import AutoTokenizer, pipeline

  m.tokenizer.save(tmp_path)
  theirs.config.id2label = dict(enumerate(TAGS))
  reference = pipeline(
    "token-classification", model=theirs, tokenizer=AutoTokenizer.from_pretrained(tmp_path),
    aggregation_strategy="first",
  )  # fmt: skip
  texts = [*TEXTS[:3], CORPUS[0], "Köln  at\tBob's boat.\n\nno?"]
  for text, spans in zip(texts, infer.tag(m, texts), strict=True):
    want = reference(text)
    got = [(s.label, s.start, s.end) for s in spans]
    assert got == [(w["entity_group"], w["start"], w["end"]) for w in want]
    np.testing.assert_allclose([s.score for s in spans], [w["score"] for w in want], atol=1e-5)
    assert all(text[s.start : s.end] == s.text for s in spans)
  assert infer.tag(m, ["", " \n"]) == [[], []]


def test_answers_are_the_best_spans_of_transformers_scores():
  theirs, m = copied("BertForQuestionAnswering")
  questions, contexts = ["Bob?", "went to", "no?"], [CORPUS[0], TEXTS[1], TEXTS[3]]
  for longest in (1, 4, 30):
    got = infer.answer(m, questions, contexts, max_answer_tokens=longest)
    for q, c, answer in zip(questions, contexts, got, strict=True):
      output, row = logits_of(theirs, m, q, c)
      places = [i for i, s in enumerate(row.sequence) if s == 1]
      start, end = (
        x[0, [0, *places]].softmax(-1) for x in (output.start_logits, output.end_logits)
      )
      best = max((float(start[i + 1] * end[j + 1]), i, j) for i in range(len(places))
                 for j in range(i, min(i + longest, len(places))))  # fmt: skip
      none = float(start[0] * end[0])
      if none > best[0]:
        assert (answer.answer, answer.start, answer.end) == ("", 0, 0)
      else:
        first, last = (row.offsets[places[k]] for k in best[1:])
        assert (answer.start, answer.end) == (first[0], last[1])
        assert c[answer.start : answer.end] == answer.answer != ""
      assert answer.score == pytest.approx(max(best[0], none), abs=1e-5)


def test_a_first_token_more_probable_than_every_span_is_no_answer():
  m = ours(head="span")
  bias = np.zeros(2, np.float32)
  silent = jax.tree.map(np.zeros_like, m.params["head"]["proj"]) | {"b": bias}
  even = dataclasses.replace(m, params={**m.params, "head": {"proj": silent}})
  got = infer.answer(even, "Bob?", "Zoë")[0]  # All alike: the span comes first.
  assert got.answer and got.score == pytest.approx(1 / (len(m.tokenizer.encode("Zoë")) - 1) ** 2)
  # The table of positions alone tells the first token from the others.
  x = np.zeros_like(m.params["encoder"]["position_embed"]["table"])
  x[0] = 9.0 * (-1.0) ** np.arange(32)
  stack = {**m.params["encoder"], "position_embed": {"table": x}}
  loud = {**silent, "w": 9.0 * np.tile((-1.0) ** np.arange(32)[:, None], 2).astype(np.float32)}
  flat = jax.tree.map(np.zeros_like, stack["layers"])
  norm = jax.tree.map(np.asarray, m.params["encoder"]["layers"][0]["attn_post_norm"])
  for name in ("attn_post_norm", "mlp_post_norm"):
    flat[0][name] = norm
  params = {**m.params, "encoder": {**stack, "layers": flat}, "head": {"proj": loud}}
  got = infer.answer(dataclasses.replace(m, params=params), "Bob?", CORPUS[0])[0]
  assert (got.answer, got.start, got.end) == ("", 0, 0) and got.score > 0.9


def test_the_best_span_is_that_of_all_pairs():
  rng = np.random.default_rng(0)
  for _ in range(50):
    n, longest = rng.integers(1, 12, 2)
    start, end = rng.random((2, n))
    every = {(i, j): start[i] * end[j] for i in range(n) for j in range(i, min(n, i + longest))}
    first, last, score = best_span(start, end, longest)
    assert every[first, last] == score == max(every.values())


@pytest.mark.parametrize(
  ("labels", "want"),
  [
    ("B-X I-X O I-X", [("X", 0, 3), ("X", 6, 7)]),
    ("B-X B-X I-Y I-Y", [("X", 0, 1), ("X", 2, 3), ("Y", 4, 7)]),
    ("B-X I-X L-X I-X", [("X", 0, 5), ("X", 6, 7)]),
    ("U-X U-X B-X L-X", [("X", 0, 1), ("X", 2, 3), ("X", 4, 7)]),
    ("S-X B-X E-X S-Y", [("X", 0, 1), ("X", 2, 5), ("Y", 6, 7)]),
    ("X X Y-Z X", [("X", 0, 3), ("Y-Z", 4, 5), ("X", 6, 7)]),
    ("I-X I-X O O", [("X", 0, 3)]),
  ],
)
def test_words_are_joined_by_each_scheme(labels, want):
  text = "a b c d"
  words = [infer.Span(label, 2 * i, 2 * i + 1, text[2 * i], 0.5 + i / 10)
           for i, label in enumerate(labels.split())]  # fmt: skip
  spans = joined(text, words)
  assert [(s.label, s.start, s.end) for s in spans] == want
  means = [np.mean([w.score for w in words if s.start <= w.start < s.end]) for s in spans]
  np.testing.assert_allclose([s.score for s in spans], means)


@pytest.mark.parametrize("kind", ["bytes", "char", "bpe", "unigram", "wordpiece"])
def test_words_are_whole_whatever_their_pieces(kind):
  text = "Zoë e\u0301a  O'Neil, 日本 😀 हिन्दी\nno"
  sizes = dict(bpe=300, unigram=90, wordpiece=160)
  t = build_tokenizer(kind, sizes.get(kind), [text] * 4)
  row = t.encode_pairs([text])[0]
  offsets = [o for o, s in zip(row.offsets, row.sequence, strict=True) if s == 0]
  words = [text[start:end] for _, start, end in word_pieces(text, offsets)]
  assert "".join(words) == "".join(text.split())
  want = ["Zoë", "e\u0301a", "O", "'", "Neil", ",", "😀", "हिन्दी", "no"]
  assert [w for w in words if not set(w) & set("日本")] == want


def test_symbols_inside_a_word_belong_to_it():
  text = "U.N. e-mail foo_bar 1,000 10:30 a:b x, end. (up)"
  pieces = [(i, i + 1) for i in range(len(text))]
  words = [text[start:end] for _, start, end in word_pieces(text, pieces)]
  assert words == ["U.N.", "e-mail", "foo_bar", "1,000", "10:30", "a", ":", "b", "x", ",", "end",
                   ".", "(", "up", ")"]  # fmt: skip


def test_one_row_of_token_types_serves_pairs_too():
  m = ours(("no", "yes"), head="sequence", num_labels=2, token_types=1)
  assert {told.label for told in infer.classify(m, ["Bob"], ["Zoë"])[0]} == {"no", "yes"}


def test_a_mask_in_a_text_stands_for_a_word_with_its_space():
  for kind in ("bpe", "unigram"):
    t = build_tokenizer(kind, 90 if kind == "unigram" else 300, CORPUS, ("<mask>",))
    alone, within = t.encode("Bob<mask> and"), t.encode("Bob <mask> and")
    assert alone == within and alone.count(t.mask_id) == 1


def test_where_no_label_is_outside_each_word_is_a_span():
  m = ours(("NOUN", "VERB", "DET"), head="token", num_labels=3)
  spans = infer.tag(m, "Bob went to Köln.")[0]
  assert [s.text for s in spans] == ["Bob", "went", "to", "Köln", "."]


def test_embeddings_are_pooled_hidden_states_alone_and_in_any_batch():
  for pooling in ("first", "last", "mean"):
    m = ours(head="embedding", pooling=pooling, normalize=pooling == "mean")
    vectors = m.embed(TEXTS)
    assert vectors.shape == (4, 32) and vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
      x = np.asarray(m.hidden([m.tokenizer.encode(text)])[0])
      want = dict(first=x[0], last=x[-1], mean=x.mean(0))[pooling]
      want = want / np.linalg.norm(want) if pooling == "mean" else want
      np.testing.assert_allclose(vector, want, atol=1e-5)
      np.testing.assert_allclose(m.embed(text)[0], vector, atol=1e-5)
  got, (a, b) = infer.similarity(m, TEXTS[:1], TEXTS[1:2]), m.embed(TEXTS[:2])
  assert got == pytest.approx([a @ b / np.linalg.norm(a) / np.linalg.norm(b)], abs=1e-5)
  assert infer.similarity(m, TEXTS, TEXTS) == pytest.approx(np.ones(4), abs=1e-5)
  with pytest.raises(ValueError, match="text 1 has"):
    m.embed(["no", LONG])
  with pytest.raises(ValueError, match="tokenizer"):
    dataclasses.replace(m, tokenizer=None).embed("no")


HEADS = {
  "fill-mask": (infer.fill_mask, dict(head=None)),
  "classify": (infer.classify, dict(head="sequence", num_labels=2)),
  "tag": (infer.tag, dict(head="token", num_labels=2)),
  "answer": (lambda m, text: infer.answer(m, text, text), dict(head="span")),
}


@pytest.mark.parametrize("task", HEADS)
def test_a_task_that_does_not_fit_names_the_one_that_does(task):
  for other, (call, _) in HEADS.items():
    if other == task:
      check_head(ours(**HEADS[task][1]).config, task)
      continue
    with pytest.raises(ValueError, match=re.escape(f"cannot {other}: use --task={task} (infer.")):
      call(ours(**HEADS[task][1]), "no")


@pytest.mark.parametrize(
  ("task", "arguments", "said"),
  [
    ("fill-mask", ("Bob",), "text 0 ('Bob') has no [MASK] to fill"),
    ("fill-mask", ("[MASK] " + LONG,), "and the model has 64 positions: shorten it"),
    ("fill-mask", ([],), "there is no text"),
    ("classify", (["no", LONG],), "text 1 has"),
    ("classify", (["a", "b"], ["c"]), "2 texts and 1 second texts"),
    ("answer", (" ",), "context 0 holds no token"),
    ("answer", (LONG,), "no room for the text itself: shorten the question"),
  ],
)
def test_impossible_texts_are_named(task, arguments, said):
  call, changes = HEADS[task]
  with pytest.raises(ValueError, match=re.escape(said)):
    call(ours(**changes), *arguments)


def test_impossible_settings_are_named():
  masked, tagger, reader = (ours(**HEADS[t][1]) for t in ("fill-mask", "tag", "answer"))
  for call, said in (
    (lambda: infer.fill_mask(masked, "[MASK]", top=0), "top=0"),
    (lambda: infer.fill_mask(masked, "[MASK]", top=97), "top=97"),
    (lambda: infer.tag(tagger, LONG, stride=62), "stride=62"),
    (lambda: infer.tag(tagger, "no", stride=-1), "stride=-1"),
    (lambda: infer.answer(reader, "a", "b", max_answer_tokens=0), "max_answer_tokens=0"),
    (lambda: infer.tag(dataclasses.replace(tagger, labels=("O",)), "a"), "names of 1 labels"),
  ):
    with pytest.raises(ValueError, match=re.escape(said)):
      call()
