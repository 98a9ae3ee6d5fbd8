# An example for the container vpc-nat-gw, where nodes have AppArmor: what the gateway's programs read, write, and use.
# Load it on every node (apparmor_parser -r), then name it in the pod: appArmorProfile: {type: Localhost, localhostProfile: natgw}.
abi <abi/3.0>,
#include <tunables/global>

profile natgw flags=(attach_disconnected, mediate_deleted) {
  #include <abstractions/base>

  capability net_admin,
  capability net_raw,
  # An operator's shell and what the image's programs are: read and run, never write.
  / r,
  /** rmix,

  # Routes, links, rules, traffic control, connections, nftables; ARP; HTTP, BFD and the answers to verbs.
  network netlink raw,
  network netlink dgram,
  network packet raw,
  network packet dgram,
  network inet raw,
  network inet dgram,
  network inet stream,
  network inet6 raw,
  network inet6 dgram,
  network inet6 stream,
  network unix,
  unix,
  signal (send, receive) peer=natgw,
  signal (receive) peer=unconfined,
  ptrace (read) peer=natgw,

  # The gateway's own files.
  owner /run/ r,
  owner /run/natgw/ rw,
  owner /run/natgw/** rwlk,
  owner /run/xtables.lock rwk,
  owner /var/lib/natgw/ rw,
  owner /var/lib/natgw/** rwlk,
  owner /etc/kube-ovn/ rw,
  owner /etc/kube-ovn/nat-gateway.env* rw,
  owner /tmp/** rwlk,
  /dev/null rw,
  /dev/pts/* rw,
  /dev/tty rw,

  # postStart sets ip_forward; init-vpc-egress-gateway.sh sets forwarding and rp_filter.
  @{PROC}/sys/net/ipv4/ip_forward rw,
  @{PROC}/sys/net/ipv6/conf/all/forwarding rw,
  @{PROC}/sys/net/ipv4/conf/*/rp_filter rw,

  deny mount,
  deny umount,
  deny pivot_root,
  deny @{PROC}/kcore r,
  deny @{PROC}/sysrq-trigger rw,
  deny /sys/** w,
}
