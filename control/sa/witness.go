package sa

import "time"

// Traffic is what was seen of a UE's ESP packets on their way in, before anybody verified them: whoever knows an SPI and
// sends from the UE's address counts as well. It is good for counters, liveness and diagnosis, never for a decision about
// identity.
type Traffic struct {
	Packets uint64
	Bytes   uint64    // of whole IP packets
	Last    time.Time // of the latest packet; zero: none yet
}

// Witness tells what was seen of packets before the ESP backend got them. Its methods may be called from any goroutine,
// take no lock that packets wait for, and make no system call.
type Witness interface {
	// Traffic returns what was seen of the UE context with this label (Params.Label), on all its inbound SAs together.
	Traffic(label uint32) Traffic

	// First returns when the first ESP packet came in on an inbound SA of a set; zero: none was seen.
	First(set uint64) time.Time
}
