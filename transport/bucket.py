"""A token bucket: how much somebody may do at once and in the long run. Pure; time is an argument.

Turner, "New directions in communications (or which way to the information age?)", IEEE Communications 24 (1986).
"""


class TokenBucket:
    """Starts full. Every event takes a token; tokens come back with time, or are granted."""

    def __init__(self, rate_per_s: float, burst: float, now: float) -> None:
        """Full.

        Args:
            rate_per_s: tokens that come back in a second.
            burst: most tokens there can be.
            now: in seconds, on any clock that only moves forward.
        """
        if rate_per_s <= 0 or burst < 1:
            raise ValueError(
                f"a bucket needs a positive rate and room for one token, got {rate_per_s} and {burst}"
            )
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._tokens = float(burst)
        self._at = now

    def take(self, now: float) -> bool:
        """Whether one more event is within the limit; it takes a token then, and nothing otherwise."""
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate_per_s)
        self._at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def grant(self, tokens: float) -> None:
        """Give tokens beside those that come with time; no more than fit."""
        self._tokens = min(self._burst, self._tokens + tokens)
