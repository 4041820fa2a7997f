package sipmsg

import "fmt"

// Method is a SIP method. Methods are case-sensitive (RFC 3261 §7.1).
type Method uint8

// Methods of the IANA registry that gmgate tells apart.
const (
	MethodOther Method = iota
	MethodRegister
	MethodInvite
	MethodAck
	MethodCancel
	MethodBye
	MethodOptions
	MethodMessage
	MethodSubscribe
	MethodNotify
	MethodPrack
	MethodUpdate
	MethodInfo
	MethodRefer
	MethodPublish
	MethodCount // number of values, for tables indexed by Method
)

var methodNames = [MethodCount]string{
	"OTHER", "REGISTER", "INVITE", "ACK", "CANCEL", "BYE", "OPTIONS", "MESSAGE",
	"SUBSCRIBE", "NOTIFY", "PRACK", "UPDATE", "INFO", "REFER", "PUBLISH",
}

// String returns the wire token, "OTHER" for MethodOther.
func (m Method) String() string {
	if m >= MethodCount {
		return fmt.Sprintf("Method(%#x)", uint8(m))
	}
	return methodNames[m]
}

// ParseMethod returns the method of a token, MethodOther when it is not one of ours.
func ParseMethod(b []byte) Method {
	switch string(b) { // the compiler switches on length first and does not allocate
	case "REGISTER":
		return MethodRegister
	case "INVITE":
		return MethodInvite
	case "ACK":
		return MethodAck
	case "CANCEL":
		return MethodCancel
	case "BYE":
		return MethodBye
	case "OPTIONS":
		return MethodOptions
	case "MESSAGE":
		return MethodMessage
	case "SUBSCRIBE":
		return MethodSubscribe
	case "NOTIFY":
		return MethodNotify
	case "PRACK":
		return MethodPrack
	case "UPDATE":
		return MethodUpdate
	case "INFO":
		return MethodInfo
	case "REFER":
		return MethodRefer
	case "PUBLISH":
		return MethodPublish
	}
	return MethodOther
}
