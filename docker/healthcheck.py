"""Whether what runs in this container is well: the service on port 8000, else the Ray node; standard library only.

A container that runs neither (a command that ends by itself) is well as long as it lives. Both questions are answered
without a key or a token.
"""

import sys
import urllib.error
import urllib.request

ADDRESSES = ("http://127.0.0.1:8000/healthz", "http://127.0.0.1:52365/api/healthz")


def healthy(address: str) -> bool | None:
    """True or False as the answer says; None when nobody listens there."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(address, timeout=4.0) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
    except urllib.error.URLError as error:
        return None if isinstance(error.reason, ConnectionRefusedError) else False
    except OSError:
        return False


if __name__ == "__main__":
    sys.exit(1 if any(healthy(address) is False for address in ADDRESSES) else 0)
