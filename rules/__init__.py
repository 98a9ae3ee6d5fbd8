"""Pure rules of the gateway: values in, values out; no I/O, no clock, no logging."""
