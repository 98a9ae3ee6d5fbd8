"""The metrics that the daemon tells besides its meters (``gateway.meters``) and what the flow watcher tells.

docs/metrics.md is made of all three. Prometheus' conventions: base units, ``_total`` on what only grows.
"""

from __future__ import annotations

from gateway.watcher.exposition import WAY, Metric

# Who it is.
INFO = Metric(
    "natgw_info", "gauge", "Always 1; the version and the iptables variant.", ("version", "variant", "appliance")
)
READY = Metric("natgw_ready", "gauge", "1 while the kernel equals the wanted state and nothing is left to be done.")
INITIALIZED = Metric("natgw_initialized", "gauge", "1 once init has been called.")
UPTIME = Metric("natgw_uptime_seconds", "gauge", "Seconds that the daemon lives.")
GENERATION = Metric("natgw_generation", "gauge", "Number of the wanted state, counted since the start.")
OBJECTS = Metric("natgw_objects", "gauge", "Objects of the wanted state.", ("kind",))
PENDING = Metric("natgw_pending", "gauge", "Kinds of work that follows a change, has not succeeded yet and is retried.")
LAST_ERROR = Metric(
    "natgw_last_error_timestamp_seconds", "gauge", "When a transaction failed last, Unix time; absent if none did."
)
CONFLICTS = Metric("natgw_address_conflicts", "gauge", "Other holders of our addresses that are known.")
ARP = Metric("natgw_arp_on", "gauge", "1 while the external interface answers ARP.")
LINK_UP = Metric("natgw_interface_up", "gauge", "1 while the interface is up; absent where there is none.", ("side",))
_LINK = ("interface", "side", WAY)
LINK_BYTES = Metric("natgw_interface_bytes_total", "counter", "Bytes through an interface; direction: rx or tx.", _LINK)
LINK_PACKETS = Metric("natgw_interface_packets_total", "counter", "Packets through an interface.", _LINK)
LINK_DROPS = Metric("natgw_interface_drops_total", "counter", "Packets that an interface dropped.", _LINK)
LINK_ERRORS = Metric("natgw_interface_errors_total", "counter", "Packets in error at an interface.", _LINK)


# What runs out.
ENTRIES = Metric("natgw_conntrack_entries", "gauge", "Connections in the kernel's table.")
ENTRIES_LIMIT = Metric("natgw_conntrack_entries_limit", "gauge", "Connections that fit the kernel's table.")
INSERT_FAILED = Metric(
    "natgw_conntrack_insert_failed_total",
    "counter",
    "Connections refused because their translated form was taken, among them all for which no source port was left.",
)
DROPPED = Metric("natgw_conntrack_dropped_total", "counter", "Connections refused because the table was full.")
EARLY_DROPPED = Metric("natgw_conntrack_early_dropped_total", "counter", "Connections thrown out to make room.")
INVALID = Metric("natgw_conntrack_invalid_total", "counter", "Packets that belong to no connection.")

WATCHER_UP = Metric("natgw_flow_watcher_up", "gauge", "1 while flows are watched; without, traffic is not counted.")

# Bandwidth limits.
_LIMIT = ("target", WAY, "match", "priority")
LIMIT = Metric(
    "natgw_qos_limit_bytes_per_second",
    "gauge",
    "A bandwidth limit; target: an EIP or an interface, match: a prefix or all.",
    _LIMIT,
)
SHAPED_BYTES = Metric("natgw_qos_bytes_total", "counter", "Bytes of frames that a limit let through.", _LIMIT)
SHAPED_PACKETS = Metric("natgw_qos_packets_total", "counter", "Packets that a limit let through.", _LIMIT)
SHAPED_DROPS = Metric("natgw_qos_drops_total", "counter", "Packets that a limit's queue dropped.", _LIMIT)
BACKLOG = Metric("natgw_qos_backlog_bytes", "gauge", "Bytes that wait in a limit's queue.", _LIMIT)

DAEMON: tuple[Metric, ...] = (
    *(INFO, READY, INITIALIZED, UPTIME, GENERATION, OBJECTS, PENDING, LAST_ERROR, CONFLICTS, ARP, LINK_UP),
    *(LINK_BYTES, LINK_PACKETS, LINK_DROPS, LINK_ERRORS),
    *(ENTRIES, ENTRIES_LIMIT, INSERT_FAILED, DROPPED, EARLY_DROPPED, INVALID),
    *(LIMIT, SHAPED_BYTES, SHAPED_PACKETS, SHAPED_DROPS, BACKLOG, WATCHER_UP),
)
"""All of them, in the order in which they are told."""
