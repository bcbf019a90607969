"""The recipe that an output carries."""

from __future__ import annotations

import io

import torch

import camkernels as ck


def test_a_saved_output_leaves_its_recipe_behind() -> None:
    x = torch.rand(4, 8, 16, 16, requires_grad=True)
    output = ck.nn.functional.batch_norm_relu(x, None, None)
    assert hasattr(output, "_camkernels_recipe")
    with_recipe, without = io.BytesIO(), io.BytesIO()
    torch.save(output, with_recipe)
    torch.save(torch.zeros_like(output), without)
    assert with_recipe.tell() < without.tell() + 2048
    with_recipe.seek(0)
    loaded = torch.load(with_recipe, weights_only=False)
    torch.testing.assert_close(loaded, output)
    weight = torch.rand(3, 8, 1, 1, requires_grad=True)
    ck.nn.functional.conv2d(loaded, weight).sum().backward()  # and it works without one
