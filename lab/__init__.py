"""The laptop lab: Kube-OVN manifests become network namespaces, and their gateways are driven as by the controller."""
