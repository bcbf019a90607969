"""Input gradients for losses of one's own."""

from __future__ import annotations

import torch
from torch import Tensor

from camkernels import modes
from camkernels.engine.function import link_between, stage_gradients


def input_gradients(
    score: Tensor, logits: Tensor, images: Tensor, create_graph: bool = True
) -> tuple[Tensor, Tensor]:
    """The gradient of a score by the images, and the guided one, from one forward.

        delta = d score / d images,  delta_G = the same by guided backpropagation, detached

    Where the engine runs the network the two go through it side by side and share what is
    recomputed; elsewhere they are two backward passes. Neither makes weight gradients. A loss made
    of delta, logits and activations of layers inside (by forward hooks or ``ck.GradCAM``) goes
    backward by ordinary autograd::

        model = ck.swap_in(model, engine=True)
        images.requires_grad_()
        logits = model(images)
        delta, delta_g = ck.input_gradients(F.cross_entropy(logits, targets), logits, images)
        loss = ... # of delta, logits, activations
        loss.backward()

    Args:
        score: 0-dim, made of ``logits``.
        logits: what ``model(images)`` returned, itself.
        images: (B, C, H, W), the very tensor the model was called with; it requires a gradient.
        create_graph: delta can be differentiated.

    Returns:
        delta (connected to the graph where ``create_graph``) and delta_G, shaped as ``images``.
        Zeros where the score does not depend on the images.

    Raises:
        ValueError: images that require no gradient, a score that is not 0-dim.

    Source: A Learning Paradigm for Interpretable Gradients, Algorithm 1.

    Example:
        >>> import torch, camkernels as ck
        >>> net = ck.swap_in(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()))
        >>> x = torch.rand(1, 3, 8, 8, requires_grad=True)
        >>> y = net(x)
        >>> ck.input_gradients(y.sum(), y, x)[0].shape
        torch.Size([1, 3, 8, 8])
    """
    if not images.requires_grad:
        raise ValueError("images: expected requires_grad=True, or they have no gradient")
    if score.dim() != 0:
        raise ValueError(f"score: expected a 0-dim tensor, got shape {tuple(score.shape)}")
    link = link_between(logits, images)
    if link is not None:
        (plain,), (guided,) = stage_gradients(score, link, create_graph)
        return tuple(torch.zeros_like(images) if g is None else g for g in (plain, guided))  # type: ignore[return-value]
    with modes.no_weight_gradients():
        with modes.guided():
            (found,) = torch.autograd.grad(score, images, retain_graph=True, materialize_grads=True)
        (delta,) = torch.autograd.grad(
            score, images, retain_graph=True, create_graph=create_graph, materialize_grads=True
        )
    return delta, found
