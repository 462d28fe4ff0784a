"""`CostModel`: what an utterance of a given length costs a model, in multiply-accumulates of a forward pass.

cost = CostModel(frame=1.0, token=0.5)
cost.of(np.array([2000]), np.array([10]))      # 25 frames of 80 ms and 10 tokens: 30.0
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FRAME_MS = 80


@dataclass(frozen=True)
class CostModel:
    """Coefficients of F encoder frames and U decoder tokens: frame·F + frame_squared·F² + token·U +
    token_squared·U² + frame_token·F·U. Backward passes scale all of them alike."""

    frame: float
    frame_squared: float = 0.0
    token: float = 0.0
    token_squared: float = 0.0
    frame_token: float = 0.0

    def of(self, duration_ms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """(N,) float64 cost of utterances padded to these lengths."""
        return self.encoder(duration_ms) + self.decoder(duration_ms, tokens)

    def encoder(self, duration_ms: np.ndarray) -> np.ndarray:
        """The part that depends on the duration alone."""
        frames = self.frames(duration_ms)
        return self.frame * frames + self.frame_squared * frames**2

    def decoder(self, duration_ms: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The part that grows with the tokens."""
        tokens = np.asarray(tokens, np.float64)
        return tokens * (self.token + self.frame_token * self.frames(duration_ms)) + self.token_squared * tokens**2

    @staticmethod
    def frames(duration_ms: np.ndarray) -> np.ndarray:
        """Encoder frames as a float: lengths are compared, not counted."""
        return np.asarray(duration_ms, np.float64) / FRAME_MS


# canary-1b, as `raytrain.model.cost.cost_of` counts it: the model of a plan that names none.
CANARY_1B = CostModel(
    frame=639_578_112.0, frame_squared=98_304.0, token=356_548_608.0, token_squared=49_152.0, frame_token=49_152.0
)
