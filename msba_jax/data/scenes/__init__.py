"""Scenes: pictures of objects and their relations, drawn by ourselves.

A class is a template, a few objects and the relation between two of them. A
scene is a pure function of (seed, index, knobs, split). See `scene.draw_scene`
for one scene and `source.ScenesData` for the data of an experiment.
"""
