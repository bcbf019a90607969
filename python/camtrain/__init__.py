"""camtrain: trains classifiers with their explanation in the loss, by the recipes of the papers.

``camtrain fit`` trains, ``camtrain demo`` shows what CAM entropy changes; both are described by
``--help``. The kernels and the criterion are those of :mod:`camkernels`.
"""
