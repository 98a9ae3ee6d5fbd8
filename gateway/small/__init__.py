"""What the processes in small containers share: a select loop, a one-request server, HTTP and Prometheus' text.

Kube-OVN gives the BFD speaker and the observer of an egress gateway 64 MiB and a fraction of a CPU, so only the
standard library is imported here, and of it little.
"""
