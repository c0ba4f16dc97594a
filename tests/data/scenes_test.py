"""Tests of drawing scenes: `msba_jax.data.scenes` without its builder."""

import collections
import dataclasses
import json
import math
import subprocess
import sys
import zlib

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from msba_jax.data.errors import InputError
from msba_jax.data.scenes import outlines, render, templates
from msba_jax.data.scenes.config import PRESETS, SPLITS, SceneConfig
from msba_jax.data.scenes.objects import find_relations
from msba_jax.data.scenes.scene import draw_scene
from msba_jax.data.scenes.templates import make_templates

SMALL = SceneConfig(size=32)
CONFIGS = st.builds(
  SceneConfig,
  size=st.sampled_from([32, 48, 64]),
  least_objects=st.integers(2, 4),
  most_objects=st.integers(4, 6),
  occlusion=st.sampled_from([0.0, 0.3, 0.6]),
  view_jitter=st.floats(0, 1),
  noise=st.sampled_from([0.0, 0.1]),
)
SCENES = hypothesis.given(
  config=CONFIGS, index=st.integers(0, 10**6), split=st.sampled_from(SPLITS)
)

REDRAW = """
import json, sys, zlib
from msba_jax.data.scenes.config import SceneConfig
from msba_jax.data.scenes.scene import draw_scene
config = SceneConfig(size=32)
print(json.dumps([
  zlib.crc32(draw_scene(3, i, config).image) for i in json.loads(sys.argv[1])
]))
"""


def same(first, second):
  """Whether two scenes are equal in every field."""
  return all(
    np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b
    for a, b in zip(first, second, strict=True)
  )


def test_a_scene_is_a_function_of_seed_and_index_alone():
  order = [5, 2, 11, 0, 7]
  here = {i: zlib.crc32(draw_scene(3, i, SMALL).image) for i in sorted(order)}
  elsewhere = subprocess.run(
    [sys.executable, '-c', REDRAW, json.dumps(order)],
    capture_output=True, check=True, text=True,
  )  # fmt: skip
  assert json.loads(elsewhere.stdout) == [here[i] for i in order]
  assert same(draw_scene(3, 5, SMALL), draw_scene(3, 5, SMALL))
  assert len(set(here.values())) == len(order)
  assert not same(draw_scene(4, 5, SMALL), draw_scene(3, 5, SMALL))
  with pytest.raises(ValueError, match='index=-1'):
    draw_scene(0, -1, SMALL)


def objects_of(template):
  """The objects of a class, in whatever relation."""
  return frozenset(template.kinds[:2])


@pytest.mark.parametrize('name', PRESETS)
def test_splits_share_neither_classes_nor_pairs_of_objects(name):
  config = PRESETS[name]
  classes = make_templates(0, config)
  assert len(classes) == len({c.name for c in classes}) == 100
  pairs = {
    split: {objects_of(classes[i]) for i in config.classes(split)}
    for split in SPLITS
  }
  assert not pairs['train'] & pairs['validation']
  assert not pairs['train'] & pairs['test']
  assert not pairs['validation'] & pairs['test']
  for split in SPLITS:  # but every shape, colour and relation is met
    made = [classes[i] for i in config.classes(split)]
    kinds = [kind for template in made for kind in template.kinds]
    assert len({kind.shape for kind in kinds}) >= 6
    assert {t.relation for t in made} == set(templates.RELATIONS[:4])


@pytest.mark.parametrize('arrangements', [1, 3, 6])
def test_hard_negatives_have_the_same_objects(arrangements):
  config = SceneConfig(arrangements=arrangements)
  families = collections.Counter(
    objects_of(t) for t in make_templates(1, config)[:60]
  )
  assert set(families.values()) == {arrangements}


def test_more_classes_of_one_split_change_no_other():
  few, many = SceneConfig(), SceneConfig(train_classes=90, test_classes=10)
  assert make_templates(0, few)[60:80] == make_templates(0, many)[90:110]
  assert make_templates(0, few)[:60] == make_templates(0, many)[:60]
  assert make_templates(0, few) != make_templates(2, few)


@SCENES
def test_the_relation_of_the_class_holds(config, index, split):
  scene = draw_scene(0, index, config, split=split)
  template = make_templates(0, config)[scene.label]
  assert scene.label in config.classes(split)
  kinds = [thing.kind for thing in scene.objects]
  assert all(kinds.count(kind) == 1 for kind in template.kinds)
  assert config.least_objects <= len(kinds) <= config.most_objects
  assert scene.graph[0].relation == template.relation
  subject = scene.objects[scene.graph[0].subject]
  target = scene.objects[scene.graph[0].target]
  assert (subject.kind, target.kind) == (template.subject, template.target)
  dx, dy = target.x - subject.x, target.y - subject.y
  equal = subject.size == target.size
  assert {
    'left of': equal and dx > abs(dy) and dx > subject.radius + target.radius,
    'above': equal and dy > abs(dx) and dy > subject.radius + target.radius,
    'inside': math.hypot(dx, dy) + subject.radius < target.radius,
    'larger than': subject.radius > 1.15 * target.radius,
  }[template.relation]
  assert set(scene.graph) == set(find_relations(list(scene.objects)))
  assert len(scene.graph) == len(set(scene.graph))


@SCENES
def test_masks_and_boxes_fit_the_picture(config, index, split):
  scene = draw_scene(0, index, config, split=split)
  assert scene.image.shape == (config.size, config.size, 3)
  assert scene.masks.any(axis=(1, 2)).all()
  assert scene.masks.sum(0).max() == 1
  for mask, box, thing in zip(
    scene.masks, scene.boxes, scene.objects, strict=True
  ):
    rows, columns = np.nonzero(mask)
    edges = [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    np.testing.assert_allclose(box * config.size, edges, atol=1e-4)
    margin = thing.reach + 1 / config.size
    assert thing.y - margin <= box[0] < box[2] <= thing.y + margin
    assert thing.x - margin <= box[1] < box[3] <= thing.x + margin
    assert 0 <= thing.hidden <= config.occlusion + 1e-6
    if config.noise == 0 and config.size == 64:
      colour = scene.image[mask].mean(0) / 255
      # Border, light and texture change the colour, but not by much.
      assert np.abs(colour - render.PALETTE[thing.colour]).max() < 0.4


def test_hiding_happens_up_to_the_bound():
  config = SceneConfig(size=32, least_objects=5, occlusion=0.6)
  hidden = [
    thing.hidden
    for i in range(30)
    for thing in draw_scene(0, i, config).objects
  ]
  assert 0.35 < max(hidden) <= 0.6 + 1e-6
  assert np.mean(np.asarray(hidden) > 0.1) > 0.2
  relations = {
    e.relation for i in range(9) for e in draw_scene(0, i, config).graph
  }
  assert 'in front of' in relations


@pytest.mark.parametrize('correlation', [0.05, 0.95])
def test_hue_correlates_with_the_label_as_told(correlation):
  config = SceneConfig(
    size=16, most_objects=2, noise=0.0, hue_correlation=correlation
  )
  hues = templates.HUES
  count, number = 200, len(templates.HUES)
  scenes = [draw_scene(0, i, config) for i in range(count)]
  own = np.mean([hues[s.label % number] == s.hue for s in scenes])
  measured = (own - 1 / number) / (1 - 1 / number)
  assert abs(measured - correlation) < 0.12
  # The hue is in the picture: the mean colour of a corner says it.
  corner = np.array([s.image[:3, :3].mean((0, 1)) for s in scenes])
  index = np.array([hues.index(s.hue) for s in scenes])
  means = np.stack([corner[index == i].mean(0) for i in range(number)])
  means -= means.mean(1, keepdims=True)
  corner -= corner.mean(1, keepdims=True)
  nearest = np.argmax(
    corner @ (means / np.linalg.norm(means, axis=1)[:, None]).T, 1
  )
  assert np.mean(nearest == index) > 0.9


def test_the_shifted_test_changes_only_the_background():
  config = SceneConfig(size=32, hue_correlation=0.95)
  pairs = [
    [draw_scene(0, i, config, split=split) for split in ('test', 'shifted')]
    for i in range(40)
  ]
  assert all(test.objects == shifted.objects for test, shifted in pairs)
  assert all(test.label == shifted.label for test, shifted in pairs)
  assert np.mean([test.hue != shifted.hue for test, shifted in pairs]) > 0.6


@SCENES
def test_captions_say_the_relation(config, index, split):
  scene = draw_scene(0, index, config, split=split)
  template = make_templates(0, config)[scene.label]
  verbs = {'larger than': ('larger than', 'bigger than')}.get(
    template.relation, (template.relation,)
  )
  inverse = {
    'left of': 'right of', 'above': 'below', 'inside': 'contains',
    'larger than': 'smaller than',
  }[template.relation]  # fmt: skip
  plain, turned, full, listing, other = scene.captions
  for caption in (plain, full):
    assert any(verb in caption for verb in verbs)
    first, second = (caption.index(str(kind)) for kind in template.kinds[:2])
    assert first < second
  assert inverse in turned
  assert turned.index(str(template.target)) < turned.index(
    str(template.subject)
  )
  assert f'{scene.hue} background' in full
  assert all(str(thing.kind) in listing for thing in scene.objects)
  assert other.endswith('.')


def test_the_view_changes_with_its_jitter():
  fixed = dataclasses.replace(SMALL, view_jitter=0.0, most_objects=2)
  jittered = dataclasses.replace(fixed, view_jitter=1.0)

  def spread(config):
    things = [draw_scene(0, i, config).objects[0] for i in range(60)]
    return np.std([thing.angle for thing in things])

  assert spread(jittered) > 1.2 * spread(fixed)


def test_outlines_are_of_like_size():
  angles = 2 * np.pi / outlines.BINS
  for shape in templates.SHAPES:
    area = (outlines.radius_table(shape) ** 2).sum() * angles / 2
    assert 0.75 < area / np.pi < 1.3, shape
  assert set(outlines.ROOM) == set(templates.CONTAINERS)
  assert set(render.PALETTE) == set(templates.COLOURS)


@pytest.mark.parametrize(
  ('knob', 'message'),
  [
    ({'occlusion': 0.7}, r'occlusion=0.7 must be between 0 and 0.6'),
    ({'least_objects': 5, 'most_objects': 3}, r'must not exceed'),
    ({'size': 8}, r'size=8 must be between'),
  ],
)
def test_knobs_out_of_range_are_refused(knob, message):
  with pytest.raises(InputError, match=message):
    SceneConfig(**knob)
