"""What Kube-OVN's lb-svc.sh leaves in the namespace of a Service's load balancer, as commands that leave the same.

Its verbs do the same in all releases from 1.12 to 1.17. Two ports stand; of a third one, whose Service moved to another
cluster IP, there is what the script's ``dnat-del`` does not take along: the route and the masquerading.
"""

from __future__ import annotations

from pod import CLUSTER_IP, LB_IP, POD_GATEWAY
from world import ROUTER

from adoption.golden import Command

OLD_CLUSTER_IP = "10.96.0.21"

_TO_TARGET = f"-p {{0}} -m {{0}} --dport {{1}} -j DNAT --to-destination {CLUSTER_IP}:{{2}}"
COMMANDS: tuple[Command, ...] = tuple(
    tuple(line.split())
    for line in f"""\
ip link set net1 up
ip link set net1 arp off
ip rule add iif net1 table 100
ip rule add iif eth0 table 100
ip addr replace {LB_IP}/24 dev net1
ip route replace 192.168.0.0/24 dev net1 table 100
ip route replace default via {ROUTER} dev net1 table 100
ip link set net1 arp on
ip route replace {OLD_CLUSTER_IP} via {POD_GATEWAY} table 100
iptables -t nat -I POSTROUTING -d {OLD_CLUSTER_IP}/32 -j MASQUERADE
iptables -t nat -A PREROUTING -d {LB_IP}/32 {_TO_TARGET.format("tcp", 80, 8080)}
ip route replace {CLUSTER_IP} via {POD_GATEWAY} table 100
iptables -t nat -I POSTROUTING -d {CLUSTER_IP}/32 -j MASQUERADE
iptables -t nat -A PREROUTING -d {LB_IP}/32 {_TO_TARGET.format("udp", 53, 5353)}
""".splitlines()
)
