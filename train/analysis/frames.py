"""Which of our modules an instruction of a compiled program comes from."""

import dataclasses
import re

from train.analysis.hlo import Instruction

_OWN = re.compile(r"(?:^|/)((?:model|train|infer)/[\w/]+\.py)$")
_PLAIN = ("Linear", "Stack", "Network", "Block", "Norm")  # Say less than who calls them.


@dataclasses.dataclass(frozen=True)
class Frames:
  """The tables of source lines in front of a program's text."""

  files: dict[int, str]
  functions: dict[int, str]
  places: dict[int, dict[str, int]]
  frames: dict[int, dict[str, int]]

  @classmethod
  def of(cls, text: str) -> "Frames":
    """Reads them; all are empty where the program has none."""
    table = lambda title: re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.MULTILINE)

    def rows(title: str) -> dict[int, str]:
      found = table(title)
      lines = found[1].splitlines() if found else []
      return {int(n): rest for n, _, rest in (line.partition(" ") for line in lines)}

    numbers = lambda rest: {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", rest)}
    names = lambda title: {n: rest.strip('"') for n, rest in rows(title).items()}
    return cls(
      names("FileNames"), names("FunctionNames"),
      {n: numbers(rest) for n, rest in rows("FileLocations").items()},
      {n: numbers(rest) for n, rest in rows("StackFrames").items()},
    )  # fmt: skip

  @property
  def _first(self) -> int:
    """How many the number of a frame's parent is too high by: some versions count 0 as a frame."""
    return self.frames.get(1, {}).get("parent_frame_id", 0)

  def calls(self, i: Instruction) -> list[str]:
    """Our functions that led to an instruction, the innermost first: `MLP.__call__`."""
    found = re.search(r"stack_frame_id=(\d+)", i.attributes)
    names, number, seen = [], int(found[1]) if found else 0, set()
    while number in self.frames and number not in seen:
      seen.add(number)
      frame = self.frames[number]
      place = self.places.get(frame.get("file_location_id", 0), {})
      if _OWN.search(self.files.get(place.get("file_name_id", 0), "")):
        names.append(self.functions.get(place.get("function_name_id", 0), ""))
      number = frame.get("parent_frame_id", 0) - self._first
    return [name for name in names if name]

  def module(self, i: Instruction) -> str:
    """The module or function that says most about an instruction; '' where nothing is known."""
    calls = self.calls(i)
    classes = [c.split(".")[0] for c in calls if re.match(r"[A-Z]\w*\.", c)]
    telling = [c for c in classes if c not in _PLAIN]
    if telling or classes:
      return (telling or classes)[0]
    return next((c.split(".")[0] for c in calls if not c.startswith("_")), "")
