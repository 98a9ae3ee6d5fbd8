"""The flow watcher: a process beside the daemon that hears of connections from the kernel and keeps sums of them.

Goals. Who asks what flows through the gateway (a scrape, ``natgw top``, the console) is answered from sums, at any size
of the connection tracking table, and no verb waits for it: so it is a process of its own, niced, with CAP_NET_ADMIN
alone.

Design. The kernel's events of ended connections (ctnetlink) change sums in O(1) and tell packets and bytes. Connections
that live are read from a dump in the background, which takes at most a hundredth of the time, and which makes good for
lost events, too. Events of beginnings are asked for where that is not soon enough, and for a log: they slow every new
connection of the machine (``hearing``). Sums belong to *accounts*: one for each rule and
direction; EIPs and totals are added up when somebody asks. The daemon starts the watcher, writes the objects of the
spec to its standard input, and reads from a socket that it hands over. End of input is the end of the watcher.

Rejected: a dump for each scrape (200,000 entries take a third of a second at best); counters of iptables rules and
tc classes (they count what opens connections, or what is limited, and reading them is a dump of the ruleset); eBPF (a
compiler or a binary in the image, and privileges that a gateway's pod need not have).
"""
