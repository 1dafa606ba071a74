"""`python -m hedwig.benchmark`, which `make bench` calls."""

from __future__ import annotations

from hedwig.benchmark import main

if __name__ == "__main__":
    main()
