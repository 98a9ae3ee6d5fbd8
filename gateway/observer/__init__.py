"""What flows through an egress gateway: its translated connections and its interfaces, as metrics and as a log.

Goals: the names, labels and log lines of Kube-OVN's ``vpc-egress-gateway-observer``, so that its users' dashboards and
parsers work unchanged; thousands of connections a second on a fraction of a CPU; little memory; one broken source does
not stop the other.

Design: ``flow`` is the value that everything is about and ``ctnetlink`` reads it from the kernel's messages; ``table``
keeps the flows that are alive and counts; ``filters``, ``limit`` and ``config`` decide what is logged. All these are
pure: no socket, no clock. ``source`` (conntrack over netlink), ``output`` (stdout) and ``observer`` (the rest) are the
shell around them, in the select loop of ``gateway.small``.

The truth about ends: the kernel sends an event only for a connection that was made while somebody listened, and drops
events that nobody reads in time. So the kernel's table is read again now and then; what is cached and no longer in
there has ended. That also moves the counters of connections that live long.

Rejected: reading the table at every scrape (a third of a second of CPU for 200,000 connections); a thread for each
source (one lock more, and the interpreter runs one at a time anyway).

Only the standard library is imported here.
"""
