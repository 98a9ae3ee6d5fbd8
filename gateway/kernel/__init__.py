"""Drivers for the real kernel: netfilter, links, conntrack."""
