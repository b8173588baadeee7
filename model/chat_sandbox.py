"""Jinja's sandbox with bounds on how long a template runs and on what it builds."""

import datetime
import functools
import json
import math
import re
import threading
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from model.chat import MOST_CHARACTERS, MOST_STEPS

_LARGEST = 1_000_000  # The largest number that a template may count with or pad to.
_MOST_WORK = 100_000_000  # Product of the lengths that a text's growth may hang on.
_GROWING = ("replace", "join", "indent", "center", "wordwrap", "batch", "slice", "truncate",
            "tojson", "round", "ljust", "rjust", "zfill", "expandtabs", "range")  # fmt: skip


class Sandbox(ImmutableSandboxedEnvironment):
  """The environment of one template, rendered by one thread at a time: hold `lock`.

  Loops, calls and filters count against MOST_STEPS, texts and lists against MOST_CHARACTERS. What
  lies between `{% generation %}` and `{% endgeneration %}` is noted in `written`.
  """

  intercepted_binops = frozenset(["+", "*", "**", "%"])

  def __init__(self):
    super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    self.lock = threading.Lock()
    self.marks = False  # Whether the template has the tag `generation`.
    self.begin([])
    filters = {**self.filters, "tojson": _to_json}
    self.filters = {name: self._bounded(name, f) for name, f in filters.items()}
    self.filters |= {"counted_": self._counted, "joined_": self._joined,
                     "measured_": self._measured}  # fmt: skip
    now = lambda form: datetime.datetime.now().strftime(form)
    self.globals |= {
      "raise_exception": _refuse, "strftime_now": now, "namespace": _Names,
      "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }  # fmt: skip
    for name in ("lipsum", "cycler", "joiner"):
      self.globals.pop(name, None)

  def begin(self, pieces: list[str]) -> None:
    """Starts a rendering whose output goes to `pieces`."""
    self.pieces, self._steps = pieces, 0
    self.written: list[tuple[int, int]] = []

  def step(self, count: int = 1) -> None:
    """Counts what a template does."""
    self._steps += count
    if self._steps > MOST_STEPS:
      raise jinja2.exceptions.SecurityError(f"it takes more than {MOST_STEPS} steps.")

  def measure(self, size: int) -> None:
    """Refuses what is too long."""
    if size > MOST_CHARACTERS:
      raise jinja2.exceptions.SecurityError(f"it writes more than {MOST_CHARACTERS} characters.")

  def _measured(self, value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict):
      self.measure(len(value))
    return value

  def unsafe_undefined(self, obj: Any, attribute: str):
    """What a template may not see is an error, not nothing."""
    raise jinja2.exceptions.SecurityError(
      f"it may not read {attribute!r} of a {type(obj).__name__}."
    )

  def wrap_str_format(self, value: Any):
    text = getattr(value, "__self__", None)
    if isinstance(text, str) and value.__name__ in ("format", "format_map"):
      _check_format(text)
    return super().wrap_str_format(value)

  def _bounded(self, name: str, function: Any) -> Any:
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)  # With the marks by which Jinja knows what else to give to it.
    def bounded(*args, **kwargs):
      self.step()
      _check(name, args[first], (*args[first + 1 :], *kwargs.values()))
      return self._measured(function(*args, **kwargs))

    return bounded

  def call(self, __context, __obj, *args, **kwargs):
    self.step()
    name, text = getattr(__obj, "__name__", ""), getattr(__obj, "__self__", "")
    _check(name, text if isinstance(text, str) else "", (*args, *kwargs.values()))
    return self._measured(super().call(__context, __obj, *args, **kwargs))

  def call_binop(self, context, operator, left, right):
    self.step()
    if operator in ("*", "**"):
      for one, other in ((left, right), (right, left)):
        if isinstance(one, int) and hasattr(other, "__len__"):
          self.measure(max(0, one) * len(other))
      numbers = isinstance(left, int) and isinstance(right, int)
      if numbers and (operator == "**" or abs(left) > _LARGEST**3 or abs(right) > _LARGEST**3):
        _check("range", "", (left, abs(right) * 10_000))
    if operator == "%" and isinstance(left, str):
      _check_format(left)
    return self._measured(super().call_binop(context, operator, left, right))

  def _parse(self, source, name, filename):
    """Has each loop counted, and texts that `~` joins measured."""
    tree = super()._parse(source, name, filename)
    for loop in tree.find_all(nodes.For):
      if loop.recursive:
        raise jinja2.TemplateSyntaxError("recursive loops are not supported", loop.lineno)
      loop.iter = _filtered(loop.iter, "counted_", loop.lineno)
    for block in tree.find_all(nodes.AssignBlock):
      block.filter = _filtered(block.filter, "measured_", block.lineno)
    _replace_joins(tree)
    return tree.set_environment(self)

  def _counted(self, values: Any) -> Any:
    if hasattr(values, "__len__"):
      self.step(len(values))
      return values
    return self._one_by_one(values)

  def _one_by_one(self, values: Any) -> Any:
    for value in values:
      self.step()
      yield value

  def _joined(self, values: list) -> str:
    return self._measured("".join(map(str, values)))


def _check(name: str, value: Any, args: tuple) -> None:
  """Refuses a function whose result may be much larger than what is given to it."""
  if name == "format":
    _check_format(str(value))
  if name not in _GROWING:
    return
  numbers = [abs(arg) for arg in args if isinstance(arg, int)]
  if max(numbers, default=0) > _LARGEST:
    said = max(numbers) if max(numbers) < 10**12 else "a number of more than 12 digits"
    raise jinja2.exceptions.SecurityError(f"it counts to {said}: at most {_LARGEST}.")
  sizes = [len(v) for v in (value, *args) if isinstance(v, str | list | tuple)] + numbers
  if math.prod(max(1, size) for size in sizes) > _MOST_WORK:
    raise jinja2.exceptions.SecurityError(
      f"{name} may write more than {MOST_CHARACTERS} characters."
    )


def _check_format(text: str) -> None:
  if re.search(r"\d{4}|\*", text):
    raise jinja2.exceptions.SecurityError("it pads texts to more than 999 characters.")


def _filtered(value: Any, name: str, line: int) -> nodes.Filter:
  return nodes.Filter(value, name, [], [], None, None, lineno=line)


def _replace_joins(tree: nodes.Node) -> None:
  for field, value in list(tree.iter_fields()):
    children = value if isinstance(value, list) else [value]
    new = []
    for child in children:
      if isinstance(child, nodes.Node):
        _replace_joins(child)
        if isinstance(child, nodes.Concat):
          child = _filtered(nodes.List(child.nodes, lineno=child.lineno), "joined_", child.lineno)
      new.append(child)
    setattr(tree, field, new if isinstance(value, list) else new[0])


class _Generation(Extension):
  """The tag around what the assistant writes."""

  tags = {"generation"}  # noqa: RUF012
  environment: Sandbox  # pyright: ignore

  def parse(self, parser):
    line = next(parser.stream).lineno
    self.environment.marks = True
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

  def _note(self, caller):
    text = caller()
    start = sum(map(len, self.environment.pieces))
    self.environment.written.append((start, start + len(text)))
    return text


class _Names(Namespace):
  """Jinja's namespace, whose names do not begin with an underscore."""

  def __init__(*args, **kwargs):  # A name may be `self`.
    self, rest = args[0], args[1:]
    values = dict(*rest, **kwargs)
    for name in values:
      _check_name(name)
    Namespace.__init__(self, values)

  def __setitem__(self, name, value):
    _check_name(name)
    super().__setitem__(name, value)


def _check_name(name: Any) -> None:
  if isinstance(name, str) and name.startswith("_"):
    raise jinja2.exceptions.SecurityError(f"a namespace holds no {name!r}.")


def _refuse(message: Any) -> None:
  raise jinja2.TemplateError(str(message))


def _to_json(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )
