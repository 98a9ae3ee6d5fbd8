"""BFD (RFC 5880, RFC 5881): how a gateway and its router notice each other's death before anyone else does.

Goals: real routers accept it (FRR, BIRD, OVN); it is the active side and never falls silent; it fits a container of a
few MiB, runs without any capability, and its timers wait for nobody's lock.

Design: ``packet`` turns bytes into values and back, ``session`` is the state machine and ``table`` finds the session a
packet belongs to. The three are pure: they take packets and the time and return packets, timers and events. ``speaker``
is the thin shell with sockets and a clock. Time is an integer number of microseconds, the unit of the protocol itself.

Rejected: asyncio (10 MB for a loop over four sockets); one thread per session (timers would queue behind the
interpreter lock); the echo function and Demand mode of our own (the kernel forwards for us, so a reflected packet would
prove nothing about this process); authentication (RFC 5880 makes it optional, and the routers we face do not ask for it
on these sessions).

Only the standard library is imported here.
"""
