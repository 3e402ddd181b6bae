"""What a connection has read and nobody has taken yet: a short queue of frames with a fixed number of places.

Two of the interpreter's built-in queues, one of frames and one of free places: its general bounded queue does its
locking in Python, several locks for every item on both sides, which shows where a thousand frames pass in a second.
"""

from __future__ import annotations

import queue
from contextlib import suppress

from transport.frames import Frame


class Inbox:
    """Frames on their way from the thread that reads to the one that consumes.

    :param places: frames that may wait in it
    """

    def __init__(self, places: int) -> None:
        self._frames: queue.SimpleQueue[Frame | None] = queue.SimpleQueue()
        self._places: queue.SimpleQueue[None] = queue.SimpleQueue()
        for _ in range(places):
            self._places.put(None)

    def put(self, frame: Frame, timeout: float) -> bool:
        """Put a frame in; False if there was no place for it within ``timeout`` seconds."""
        try:
            self._places.get(timeout=timeout)
        except queue.Empty:
            return False
        self._frames.put(frame)
        return True

    def end(self) -> None:
        """Nothing more comes: after what is in it, :meth:`get` gives None."""
        self._frames.put(None)

    def get(self, timeout: float) -> Frame | None:
        """The next frame, waiting at most ``timeout`` seconds; None at the end, which it tells once.

        :raises queue.Empty: nothing came in time
        """
        frame = self._frames.get(timeout=timeout)
        if frame is not None:
            self._places.put(None)
        return frame

    def drain(self) -> None:
        """Give back the buffers of all frames in it; an end that was told stays told."""
        ended = False
        with suppress(queue.Empty):
            while True:
                frame = self._frames.get_nowait()
                if frame is None:
                    ended = True
                else:
                    frame.release()
                    self._places.put(None)
        if ended:
            self._frames.put(None)
