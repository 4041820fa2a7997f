package front

// SocketBuffer is the default of Config.ReadBuffer and Config.WriteBuffer, in octets.
const SocketBuffer = defaultSocketBuffer

// Descriptors returns the least RLIMIT_NOFILE with which so many connections need not be lowered.
func Descriptors(connections int) int { return connections + coreReserve + reservedFDs }
