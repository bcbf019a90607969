"""The second-order engine: a network as scheduled passes over its convolutions.

``trace`` finds the operations, ``plan`` divides them into stages and says what is kept, ``passes``
runs them, ``function`` shows them to autograd, ``forward`` stands in the place of the network's own.
"""

from camkernels.engine.forward import EngineError, EngineForward, install

__all__ = ["EngineError", "EngineForward", "install"]
