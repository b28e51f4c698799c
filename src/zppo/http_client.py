"""The HTTP client that the openai package stands on, whatever it is called: `from zppo.http_client import httpx`."""

try:
    import httpx2 as httpx
except ImportError:  # of older versions
    import httpx  # type: ignore[no-redef]

__all__ = ["httpx"]
