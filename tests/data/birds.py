"""What prepared copies of caltech_birds2011 have in common."""

import tensorflow_datasets as tfds


def birds_info(builder, names):
  """The features of the real data set, with other class names."""
  features = tfds.features.FeaturesDict(
    {
      'image': tfds.features.Image(),
      'image/filename': tfds.features.Text(),
      'bbox': tfds.features.BBoxFeature(),
      'label': tfds.features.ClassLabel(names=names),
      'segmentation_mask': tfds.features.Image(shape=(None, None, 1)),
    }
  )
  return tfds.core.DatasetInfo(
    builder=builder, features=features, supervised_keys=('image', 'label')
  )
