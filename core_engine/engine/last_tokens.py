"""LastTokens: on the device, the tokens that a step in flight gives to its rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from quire.utils.transfers import upload


class LastTokens:
    """What the device has chosen last for each row, for the next step to begin with.

    So that the step can be prepared and launched before the host knows these tokens. Nothing
    here waits for the device.

    Parameters
    ----------
    num_rows : int
    device : torch.device
    """

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._device = device
        self._token_ids: torch.Tensor | None = None

    def keep(self, rows: npt.NDArray[np.int64], token_ids: torch.Tensor) -> None:
        """Note a token for each of some rows, which are all different.

        Parameters
        ----------
        rows : ndarray[num_rows], int64
        token_ids : Tensor[num_rows], int64
        """
        if self._token_ids is None:
            self._token_ids = token_ids.new_zeros(self._num_rows)
        (places,) = upload([rows], self._device)
        self._token_ids.index_copy_(0, places, token_ids)

    def fill(self, input_ids: torch.Tensor, pending_rows: torch.Tensor) -> torch.Tensor:
        """Return a step's tokens, with those filled in that the host does not know.

        Parameters
        ----------
        input_ids : Tensor[num_tokens], int64
        pending_rows : Tensor[num_tokens], int64
            The row whose last token it is; -1 where the id is known.
        """
        assert self._token_ids is not None
        last = self._token_ids.index_select(0, pending_rows.clamp(min=0))
        return torch.where(pending_rows < 0, input_ids, last)

    def close(self) -> None:
        """Let the memory go."""
        self._token_ids = None
