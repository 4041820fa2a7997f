package sipmsg

import (
	"encoding/binary"
	"fmt"
)

// HeaderID names a header field. Names are compared without regard to case and compact forms count as the long one
// (RFC 3261 §7.3.3).
type HeaderID uint8

// Header fields. Everything else is Other and is found with Msg.HeaderNamed.
const (
	Other HeaderID = iota
	Via
	From
	To
	CallID
	CSeq
	MaxForwards
	Route
	RecordRoute
	Contact
	ContentLength
	ContentType
	Path
	ServiceRoute
	Require
	ProxyRequire
	Supported
	Expires
	Event
	SecurityClient
	SecurityServer
	SecurityVerify
	Authorization
	WWWAuthenticate
	ProxyAuthorization
	ProxyAuthenticate
	AuthenticationInfo
	PAccessNetworkInfo
	PAssertedIdentity
	PPreferredIdentity
	PAssociatedURI
	PCalledPartyID
	PChargingVector
	PChargingFunctionAddresses
	PVisitedNetworkID
	PAssertedService
	PPreferredService
	PUserDatabase
	PProfileKey
	PServedUser
	PEarlyMedia
	PMediaAuthorization
	PAnswerState
	PRefusedURIList
	FeatureCaps
	Privacy
	Reason
	RetryAfter
	Warning
	Allow
	Unsupported
	Date
	UserAgent
	Server
	Subject
	Replaces
	AllowEvents
	SubscriptionState
	SIPETag
	SIPIfMatch
	SuppressIfMatch
	ReferTo
	ReferredBy
	ReferSub
	Identity
	IdentityInfo
	RequestDisposition
	AcceptContact
	RejectContact
	SessionExpires
	MinSE
	MinExpires
	ContentEncoding
	ContentDisposition
	ContentLanguage
	MIMEVersion
	Accept
	AcceptEncoding
	AcceptLanguage
	AlertInfo
	CallInfo
	ErrorInfo
	InReplyTo
	Organization
	Priority
	ReplyTo
	Timestamp
	RSeq
	RAck
	Join
	HistoryInfo
	Geolocation
	GeolocationRouting
	GeolocationError
	ResourcePriority
	AcceptResourcePriority
	TargetDialog
	RecvInfo
	InfoPackage
	MaxBreadth
	FlowTimer
	SessionID
	AnswerMode
	PrivAnswerMode
	UserToUser
	CellularNetworkInfo
	RestorationInfo
	ResourceShare
	PriorityShare
	ResponseSource
	RelayedCharge
	AdditionalIdentity
	ServiceInteractInfo
	headerCount
)

// maxHeaderIDs bounds the enumeration: Msg keeps two 64-bit sets of the IDs it has seen.
const maxHeaderIDs = 128

const _ = uint(maxHeaderIDs - headerCount) // does not compile when the enumeration outgrows the sets

var headerNames = [headerCount]string{ //nolint:gosec // G101: names of header fields, no credentials
	Other: "Other", Via: "Via", From: "From", To: "To", CallID: "Call-ID", CSeq: "CSeq", MaxForwards: "Max-Forwards",
	Route: "Route", RecordRoute: "Record-Route", Contact: "Contact", ContentLength: "Content-Length",
	ContentType: "Content-Type", Path: "Path", ServiceRoute: "Service-Route", Require: "Require",
	ProxyRequire: "Proxy-Require", Supported: "Supported", Expires: "Expires", Event: "Event",
	SecurityClient: "Security-Client", SecurityServer: "Security-Server", SecurityVerify: "Security-Verify",
	Authorization: "Authorization", WWWAuthenticate: "WWW-Authenticate", ProxyAuthorization: "Proxy-Authorization",
	ProxyAuthenticate: "Proxy-Authenticate", AuthenticationInfo: "Authentication-Info",
	PAccessNetworkInfo: "P-Access-Network-Info", PAssertedIdentity: "P-Asserted-Identity",
	PPreferredIdentity: "P-Preferred-Identity", PAssociatedURI: "P-Associated-URI", PCalledPartyID: "P-Called-Party-ID",
	PChargingVector: "P-Charging-Vector", PChargingFunctionAddresses: "P-Charging-Function-Addresses",
	PVisitedNetworkID: "P-Visited-Network-ID", PAssertedService: "P-Asserted-Service",
	PPreferredService: "P-Preferred-Service", PUserDatabase: "P-User-Database", PProfileKey: "P-Profile-Key",
	PServedUser: "P-Served-User", PEarlyMedia: "P-Early-Media", PMediaAuthorization: "P-Media-Authorization",
	PAnswerState: "P-Answer-State", PRefusedURIList: "P-Refused-URI-List", FeatureCaps: "Feature-Caps",
	Privacy: "Privacy", Reason: "Reason", RetryAfter: "Retry-After", Warning: "Warning", Allow: "Allow",
	Unsupported: "Unsupported", Date: "Date", UserAgent: "User-Agent", Server: "Server", Subject: "Subject",
	Replaces: "Replaces", AllowEvents: "Allow-Events", SubscriptionState: "Subscription-State", SIPETag: "SIP-ETag",
	SIPIfMatch: "SIP-If-Match", SuppressIfMatch: "Suppress-If-Match", ReferTo: "Refer-To", ReferredBy: "Referred-By",
	ReferSub: "Refer-Sub", Identity: "Identity", IdentityInfo: "Identity-Info",
	RequestDisposition: "Request-Disposition", AcceptContact: "Accept-Contact", RejectContact: "Reject-Contact",
	SessionExpires: "Session-Expires", MinSE: "Min-SE", MinExpires: "Min-Expires", ContentEncoding: "Content-Encoding",
	ContentDisposition: "Content-Disposition", ContentLanguage: "Content-Language", MIMEVersion: "MIME-Version",
	Accept: "Accept", AcceptEncoding: "Accept-Encoding", AcceptLanguage: "Accept-Language", AlertInfo: "Alert-Info",
	CallInfo: "Call-Info", ErrorInfo: "Error-Info", InReplyTo: "In-Reply-To", Organization: "Organization",
	Priority: "Priority", ReplyTo: "Reply-To", Timestamp: "Timestamp", RSeq: "RSeq", RAck: "RAck", Join: "Join",
	HistoryInfo: "History-Info", Geolocation: "Geolocation", GeolocationRouting: "Geolocation-Routing",
	GeolocationError: "Geolocation-Error", ResourcePriority: "Resource-Priority",
	AcceptResourcePriority: "Accept-Resource-Priority", TargetDialog: "Target-Dialog", RecvInfo: "Recv-Info",
	InfoPackage: "Info-Package", MaxBreadth: "Max-Breadth", FlowTimer: "Flow-Timer", SessionID: "Session-ID",
	AnswerMode: "Answer-Mode", PrivAnswerMode: "Priv-Answer-Mode", UserToUser: "User-to-User",
	CellularNetworkInfo: "Cellular-Network-Info", RestorationInfo: "Restoration-Info", ResourceShare: "Resource-Share",
	PriorityShare: "Priority-Share", ResponseSource: "Response-Source", RelayedCharge: "Relayed-Charge",
	AdditionalIdentity: "Additional-Identity", ServiceInteractInfo: "Service-Interact-Info",
}

// compactNames are the compact forms of the IANA registry "SIP Header Fields"; both cases are filled in by init.
var compactNames = [256]HeaderID{
	'a': AcceptContact, 'b': ReferredBy, 'c': ContentType, 'd': RequestDisposition, 'e': ContentEncoding, 'f': From,
	'i': CallID, 'j': RejectContact, 'k': Supported, 'l': ContentLength, 'm': Contact, 'n': IdentityInfo, 'o': Event,
	'r': ReferTo, 's': Subject, 't': To, 'u': AllowEvents, 'v': Via, 'x': SessionExpires, 'y': Identity,
}

// singleRows are the header fields that may stand in a message only once and whose repetition would leave it open which
// one counts (RFC 3261 §7.3.1, §20).
var singleRows = setOf(From, To, CallID, CSeq, MaxForwards, ContentLength, ContentType, Expires, Event)

type idSet [2]uint64

func setOf(ids ...HeaderID) (s idSet) {
	for _, id := range ids {
		s[id>>6] |= 1 << (id & 63)
	}
	return s
}

// String returns the canonical long name.
func (id HeaderID) String() string {
	if id >= headerCount {
		return fmt.Sprintf("HeaderID(%#x)", uint8(id))
	}
	return headerNames[id]
}

// ParseHeaderID returns the ID of a header field name, long or compact, in any case; Other when it is not known.
func ParseHeaderID(name []byte) HeaderID { return lookup(name, 0, len(name)) }

// Names are looked up by their first and last eight bytes, lower-cased by setting bit 5. That is exact for our purpose:
// known names consist of letters and '-', and the only other byte that maps onto one of these is CR (to '-'), which
// both Scan and Frame refuse inside a name.
const (
	lowerCase = 0x2020202020202020
	nameSlots = 1024
	maxName   = 32
)

type nameEntry struct {
	first, last   uint64 // bytes 0-7 and n-8..n-1; the same masked word for names shorter than 8
	second, third uint64 // bytes 8-15 and n-16..n-9, for names longer than 16
	n             uint8
	id            HeaderID
}

var (
	nameEntries [headerCount]nameEntry
	nameIndex   [nameSlots]uint8 // open addressing; index into nameEntries, 0 = free
)

func init() {
	for c := byte('a'); c <= 'z'; c++ {
		compactNames[c-0x20] = compactNames[c]
	}
	var pad [maxName + 8]byte
	for id := Other + 1; id < headerCount; id++ {
		pad = [maxName + 8]byte{}
		n := copy(pad[:maxName], headerNames[id])
		e := makeEntry(pad[:], 0, n)
		e.id = id
		nameEntries[id] = e
		i := slot(e.first, e.last)
		for nameIndex[i] != 0 {
			i = (i + 1) % nameSlots
		}
		nameIndex[i] = uint8(id)
	}
}

func slot(first, last uint64) uint64 {
	return ((first * 0x9E3779B97F4A7C15) ^ (last * 0xC2B2AE3D27D4EB4F)) >> 54 % nameSlots
}

func makeEntry(b []byte, s, n int) (e nameEntry) {
	e.n = uint8(n)
	e.first = binary.LittleEndian.Uint64(b[s:]) | lowerCase
	if n < 8 {
		e.first &= 1<<(8*n) - 1
		e.last = e.first
		return e
	}
	e.last = binary.LittleEndian.Uint64(b[s+n-8:]) | lowerCase
	if n > 16 {
		e.second = binary.LittleEndian.Uint64(b[s+8:]) | lowerCase
		e.third = binary.LittleEndian.Uint64(b[s+n-16:]) | lowerCase
	}
	return e
}

// lookup classifies the name b[s:s+n]. The bytes after it are read (and masked), so that whole words can be loaded.
func lookup(b []byte, s, n int) HeaderID {
	if n == 1 {
		return compactNames[b[s]]
	}
	if n < 2 || n > maxName {
		return Other
	}
	if s+8 > len(b) { // a short name at the very end of the buffer
		var pad [16]byte
		copy(pad[:], b[s:s+n])
		return lookup(pad[:], 0, n)
	}
	first := binary.LittleEndian.Uint64(b[s:]) | lowerCase
	var last uint64
	if n < 8 {
		first &= 1<<(8*uint(n)) - 1
		last = first
	} else {
		last = binary.LittleEndian.Uint64(b[s+n-8:]) | lowerCase
	}
	for i := slot(first, last); ; i = (i + 1) % nameSlots {
		k := nameIndex[i]
		if k == 0 {
			return Other
		}
		e := &nameEntries[k]
		if e.first != first || e.last != last || int(e.n) != n {
			continue
		}
		if n > 16 && (binary.LittleEndian.Uint64(b[s+8:])|lowerCase != e.second ||
			binary.LittleEndian.Uint64(b[s+n-16:])|lowerCase != e.third) {
			continue
		}
		return e.id
	}
}
