package sipmsg

// Error is a reason why a message, a value, a frame or an edit was refused. All errors of this package are sentinels of
// this type: comparable by ==, and returned without allocation.
type Error struct {
	Reason string // snake_case token for metrics and logs
	Text   string // what is wrong, fit for the reason phrase of a 400
}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Errors of Msg.Scan and Frame.
var (
	ErrTruncated     = &Error{"truncated", "message ends inside the header"}
	ErrTooLarge      = &Error{"too_large", "message is too large"}
	ErrStartLine     = &Error{"start_line", "malformed start line"}
	ErrRequestURI    = &Error{"request_uri", "malformed Request-URI"}
	ErrStatusCode    = &Error{"status_code", "malformed status code"}
	ErrVersion       = &Error{"version", "SIP version is not 2.0"}
	ErrHeader        = &Error{"header", "malformed header field"}
	ErrTooManyRows   = &Error{"too_many_headers", "too many header fields"}
	ErrControl       = &Error{"control_character", "NUL or bare CR in the header"}
	ErrDuplicate     = &Error{"duplicate_header", "single-value header field is repeated"}
	ErrNoVia         = &Error{"no_via", "Via is missing"}
	ErrNoFrom        = &Error{"no_from", "From is missing"}
	ErrNoTo          = &Error{"no_to", "To is missing"}
	ErrNoCallID      = &Error{"no_call_id", "Call-ID is missing"}
	ErrNoCSeq        = &Error{"no_cseq", "CSeq is missing"}
	ErrCSeq          = &Error{"cseq", "malformed CSeq"}
	ErrCSeqMethod    = &Error{"cseq_method", "CSeq method differs from the request method"}
	ErrContentLength = &Error{"content_length", "malformed Content-Length"}
	ErrShortBody     = &Error{"short_body", "body is shorter than Content-Length"}
)

// ErrNoContentLength is an error of Frame only.
var ErrNoContentLength = &Error{"no_content_length", "Content-Length is missing on a stream"}

// Errors of the value parsers.
var (
	ErrVia         = &Error{"via", "malformed Via"}
	ErrViaProtocol = &Error{"via_protocol", "protocol in Via is not SIP/2.0"}
	ErrURI         = &Error{"uri", "malformed URI"}
	ErrNameAddr    = &Error{"name_addr", "malformed address"}
)

// Errors of Edit.
var (
	ErrEditRange   = &Error{"edit_range", "edit lies outside the message"}
	ErrEditOverlap = &Error{"edit_overlap", "edits overlap"}
	ErrEditTooMany = &Error{"edit_too_many", "too many edits"}
	ErrEditOpen    = &Error{"edit_open", "edit builder is not closed or not open"}
)
