"""Trainers with a criterion of camkernels in the place of cross-entropy; see docs/trainers.md."""
