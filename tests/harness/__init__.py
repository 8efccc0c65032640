"""Real processes, real sockets, scripted providers: what the tests stand on."""
