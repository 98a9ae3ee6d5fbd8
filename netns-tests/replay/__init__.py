"""What Kube-OVN's controllers from 1.12 to 1.17 send, what must stand after each step, and the engine that plays it."""
