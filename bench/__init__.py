"""What the gateway costs, measured in namespaces: ``make bench``, or ``python -m bench --help``. Needs root.

One module per question; ``bed`` is the world they measure in, ``report`` what they hand back, ``pictures`` and
``page`` what becomes of it. bfd_detection, bfd_failover and qos_classes are programs of their own.
"""

import sys
from pathlib import Path

# The helpers that make namespaces and drive gateways stand beside the tests that use them, too.
sys.path.insert(0, str(Path(__file__).parent.parent / "netns-tests"))
