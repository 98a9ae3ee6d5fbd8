"""ARP on the external interface: announcing our addresses and noticing their other holders.

``frame`` is bytes, ``schedule`` and ``conflict`` decide (no I/O, no clock: time is an argument),
``link`` and ``wire`` are the two kernel sockets, and ``announcer`` ties them to the writer thread
and to the daemon's event loop.
"""
