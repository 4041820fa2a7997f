// Package sipwire is the SIP message model of the test ends (bench/core and bench/ue): parse, print, list and
// parameter values, stream framing and sockets.
//
// It is deliberately not dataplane/sipmsg: the test ends check gmgate, so they read and write messages with code of
// their own. The parser is strict where RFC 3261 §7 is (CRLF line ends, one start line, mandatory headers,
// Content-Length equal to the body of a datagram): whatever it refuses is a fault of the sender.
//
// Messages and values are plain data without locks; they may be read from several goroutines once nobody changes them.
package sipwire
