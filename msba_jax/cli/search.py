"""Finds the images of an index that look like a given one.

Prints rank, score, id and, where the index knows it, the class of each
result. `--mode neighbours` refines the query and the first results by their
own nearest neighbours in the index and orders them anew; the index must have
been built with `--regions`.

Attributes:
  Options: the flags of `msba search`.
  run: searches and prints.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

if TYPE_CHECKING:
  import numpy as np

  from msba_jax.data.images import Interpolation

EXAMPLES = """\
  msba search photo.jpg --index photos.index --run runs/scenes_msba/seed0
  msba search photo.jpg --index photos.index --run runs/scenes_msba/seed0 \\
    --mode neighbours -k 20 --picture found.png
"""
INTERRUPTED = 'Nothing was changed.'


@dataclass(frozen=True)
class Options:
  """Flags of `msba search`."""

  image: Annotated[Path, Positional, arg(metavar='IMAGE')]
  """The image to look for."""
  index: Path
  """Directory of the index, as `msba index` built it."""
  run: Path
  """Directory of the run that built it."""
  mode: Literal['solo', 'neighbours'] = 'solo'
  """solo: by the image alone. neighbours: order the first results anew."""
  k: Annotated[int, arg(name='results', aliases=['-k'])] = 10
  """How many results."""
  picture: Path | None = None
  """Also write a picture of the query and its results, a PNG file."""


def run(options: Options) -> int:
  """Searches; 0 when the results are printed."""
  from msba_jax.cli.index import image_interpolation
  from msba_jax.data.errors import InputError
  from msba_jax.retrieval.index import open_index, search_index
  from msba_jax.training.run import load_run

  if options.k < 1:
    raise InputError(f'-k {options.k} must be at least 1')
  trained = load_run(options.run)
  index = open_index(options.index, trained.fingerprint)
  image = _read_image(
    options.image,
    side=index.image_shape[0],
    interpolation=image_interpolation(trained),
  )
  found = search_index(
    index,
    trained.embedder,
    image[None],
    options.k,
    mode=options.mode,
    neighbours=trained.experiment.evaluation.neighbours,
    progress=False,
  )
  rows, scores = found.indices[0], found.scores[0]
  width = max(len(index.ids[row]) for row in rows)
  for rank, (row, score) in enumerate(zip(rows, scores, strict=True), 1):
    name = '' if index.labels is None else index.class_names[index.labels[row]]
    print(f'{rank:>4} {score:8.4f}  {index.ids[row]:<{width}}  {name}'.rstrip())
  if options.picture is not None:
    _draw(options, index, image, rows, scores)
    print(f'The picture stands in {options.picture}.')
  return 0


def _read_image(
  path: Path, *, side: int, interpolation: 'Interpolation'
) -> 'np.ndarray':
  """One image, decoded as the images of a collection are."""
  from msba_jax.data.errors import InputError
  from msba_jax.data.images import decode_image

  try:
    data = path.read_bytes()
  except OSError as error:
    raise InputError(
      f'the image {path} cannot be read ({error.strerror}): name another file'
    ) from error
  return decode_image(
    data, name=str(path), size=side, interpolation=interpolation
  )


def _draw(options: Options, index, image, rows, scores) -> None:
  import numpy as np
  from PIL import Image

  from msba_jax.retrieval.report.picture import results_picture

  assert options.picture is not None
  results_picture(
    image,
    [
      np.asarray(Image.open(io.BytesIO(index.thumbnails[int(row)])))
      for row in rows
    ],
    None,
    scores,
    options.picture,
    ids=[index.ids[row] for row in rows],
    query_id=options.image.name,
  )
