"""Tests of the files in `experiments/`."""

import dataclasses
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from msba_jax.data.errors import InputError
from msba_jax.data.folder import FolderData
from msba_jax.models.nexus import published_mixers
from msba_jax.training.load import load_experiment
from msba_jax.training.loop import train
from msba_jax.training.pretrained import (
  Preprocessing,
  Pretrained,
  save_pretrained,
)
from tests.data.birds import birds_info

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / 'experiments').glob('*.py'))
SYSTEMS = {
  'scenes_msba': ('scenes_backbone', 'scenes_batchformer', 'scenes_castle'),
  'tiny_imagenet_msba': (
    'tiny_imagenet_backbone',
    'tiny_imagenet_batchformer',
    'tiny_imagenet_castle',
    'tiny_imagenet_nexus',
    *(f'tiny_imagenet_nexus:{name}' for name in published_mixers(2)),
  ),
  'scenes_nexus:msba': (
    'scenes_nexus',
    'scenes_nexus:regions',
    'scenes_nexus:fixed',
    *(f'scenes_nexus:{name}' for name in published_mixers(3)),
  ),
  'fine_nexus:1024': tuple(
    f'fine_nexus:1024-{name}' for name in published_mixers(8)
  ),
}

# A word behind the name of a file that needs one.
VARIANTS = {
  'manifold_keys': 'swin-simple',
  'fusers': 'smallest-mmfuser',
  'fine_nexus': '1024',
  'backbones': 'scenes-vit_half',
}


def load(name, *overrides):
  file, _, variant = name.partition(':')
  path = f'{ROOT / "experiments" / file}.py'
  return load_experiment(f'{path}:{variant}' if variant else path, overrides)


def parameters(experiment):
  """How many parameters follow the backbone, without making any."""
  size = experiment.data.size
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  shapes = jax.eval_shape(experiment.model.init, jax.random.key(0), images)
  heads = {k: v for k, v in shapes['params'].items() if k != 'backbone'}
  return sum(leaf.size for leaf in jax.tree.leaves(heads))


def test_there_are_the_files_that_the_documents_name():
  names = {path.stem for path in FILES}
  named = {*SYSTEMS, *sum(SYSTEMS.values(), ()), 'cub_msba'}
  assert names >= {name.partition(':')[0] for name in named}


@pytest.mark.parametrize('path', FILES, ids=lambda path: path.stem)
def test_an_experiment_is_called_as_its_file(path):
  variant = VARIANTS.get(path.stem)
  experiment = load_experiment(f'{path}:{variant}' if variant else path)
  assert experiment.name == '_'.join(filter(None, (path.stem, variant)))
  # One row of the head for each training class, and one slot of the memory if
  # there is one.
  assert experiment.memory_size in (0, experiment.model.num_classes)


@pytest.mark.parametrize('system', SYSTEMS)
def test_controls_have_as_many_parameters_and_the_same_budget(system):
  own = load(system)
  for name in SYSTEMS[system]:
    control = load(name)
    ratio = parameters(control) / parameters(own)
    assert abs(ratio - 1) < 0.02, f'{name}: {ratio:.3f}'
    for field in ('data', 'optimizer', 'steps', 'classes_per_batch', 'augment'):
      assert getattr(control, field) == getattr(own, field), (name, field)


class CaltechBirds2011(tfds.core.GeneratorBasedBuilder):
  """The features of the real one, 24 classes of 2 pictures."""

  VERSION = tfds.core.Version('0.1.1')

  def _info(self):
    return birds_info(self, [f'{c:03d}.Bird' for c in range(24)])

  def _split_generators(self, dl_manager):
    return {'train': self._pictures(0), 'test': self._pictures(1)}

  def _generate_examples(self):
    raise NotImplementedError

  def _pictures(self, seed):
    rng = np.random.default_rng(seed)
    for label in range(24):
      files = []
      for shape in ((40, 52, 3), (40, 52)):
        pixels = rng.integers(0, 256, shape, np.uint8)
        files.append(io.BytesIO())
        Image.fromarray(pixels).save(files[-1], 'PNG')
        files[-1].seek(0)
      yield (
        label,
        {
          'image': files[0],
          'image/filename': f'{label}.jpg',
          'bbox': tfds.features.BBox(0.0, 0.0, 1.0, 1.0),
          'label': label,
          'segmentation_mask': files[1],
        },
      )


@pytest.fixture(scope='module')
def birds(tmp_path_factory):
  directory = tmp_path_factory.mktemp('tfds')
  builder = CaltechBirds2011(data_dir=directory, file_format='array_record')
  builder.download_and_prepare()
  return directory


def test_birds_are_read_as_tfds_prepares_them(birds):
  splits = load('cub_msba', '--data.data-dir', str(birds)).data.open()
  assert splits.test.gallery is None
  names = [
    set(source.class_names)
    for source in (
      splits.train, splits.validation.queries, splits.test.queries
    )
  ]  # fmt: skip
  assert names[2] == {f'{c:03d}.Bird' for c in range(12, 24)}
  assert names[0] | names[1] == {f'{c:03d}.Bird' for c in range(12)}
  assert len(names[1]) == 10
  assert not names[0] & names[1]
  # The data set's own training and test pictures of a class come together.
  assert len(splits.test.queries) == 24
  record = splits.test.queries[0]
  assert record['image'].shape == (224, 224, 3)
  assert record['image'].dtype == np.uint8


def test_birds_that_are_not_prepared_are_an_error_that_says_how(tmp_path):
  experiment = load('cub_msba', '--data.data-dir', str(tmp_path))
  with pytest.raises(InputError, match='caltech_birds2011'):
    experiment.data.open()


PRETRAINED = ('cub_dinov2', 'cars_siglip', 'sop_vit')


@pytest.mark.parametrize('name', PRETRAINED)
def test_a_pretrained_experiment_trains_on_what_was_imported(
  name, tmp_path, rng
):
  """Two steps with a small backbone of the same kind and random weights."""
  given = load(name)
  vit = given.model.backbone
  spec = dataclasses.replace(
    vit.spec, features=8, depth=2, num_heads=2, patch=4, image=16
  )
  pixels = jnp.zeros((1, 16, 16, 3))
  small = vit.clone(spec=spec, levels=(1,))
  shapes = jax.eval_shape(small.init, jax.random.key(0), pixels)
  params = jax.tree.map(
    lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), shapes
  )
  weights = tmp_path / 'weights'
  preprocessing = Preprocessing(
    16, given.mean, given.std, given.data.interpolation
  )
  family = name.split('_')[1]
  save_pretrained(
    weights,
    Pretrained(family, spec, None, preprocessing, {'backbone': params}),
    source='random',
  )
  write_photos(tmp_path / 'photos', rng)
  experiment = dataclasses.replace(
    given,
    model=given.model.clone(
      backbone=vit.clone(spec=spec, levels=(1, 2)),
      num_classes=4,
      caf=given.model.caf.clone(features=8),
      msw=given.model.msw.clone(features=8, num_heads=2),
      bcp=given.model.bcp.clone(num_heads=2),
    ),
    data=FolderData(
      path=str(tmp_path / 'photos'),
      size=16,
      validation_classes=2,
      class_split='random',
      interpolation=given.data.interpolation,
    ),
    classes_per_batch=2,
    images_per_class=2,
    optimizer=dataclasses.replace(given.optimizer, warmup_steps=1),
    pretrained=str(weights),
    memory_size=min(given.memory_size, 4),
    steps=2,
    evaluate_every=0,
  )
  run = train(experiment, tmp_path / 'run', progress=False)
  trained = run.params['backbone']
  # Adam moves a parameter by no more than the rate in a step.
  start, end = (
    x['block_0']['attention']['qkv']['kernel']
    for x in (params['params'], trained)
  )
  change = np.abs(start - np.asarray(end)).max()
  assert 0 < change < 2 * given.optimizer.learning_rate


def write_photos(folder, rng):
  for label in range(10):
    (folder / f'{label}').mkdir(parents=True)
    for i in range(4):
      pixels = rng.integers(0, 256, (20, 16, 3), np.uint8)
      Image.fromarray(pixels).save(folder / f'{label}' / f'{i}.png')
