#!/usr/bin/env bash
# Makes the certificate authority of a federation, once, and a certificate of the server, which can be made anew.
#   certificates.sh FOLDER NAME [NAME ...]     the server's names and IP addresses, as nodes write them
# FOLDER gets ca.key (keep it off the server), ca.crt (for everybody), server.key, server.crt.
set -euo pipefail
(($# >= 2)) || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
folder=$1; shift
mkdir -p "$folder"
cd "$folder"
umask 077 # keys are for their owner alone
names=""
for name in localhost 127.0.0.1 "$@"; do # the server's own programs use the first two
    kind=DNS
    [[ $name =~ ^[0-9.]+$ || $name == *:* ]] && kind=IP
    names+="${names:+,}$kind:$name"
done
if [[ ! -e ca.key ]]; then
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc -sha384 -days 3650 -keyout ca.key -out ca.crt \
        -subj "/CN=fedlabel federation" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
        -addext "keyUsage=critical,keyCertSign,cRLSign" 2> /dev/null
fi
openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-384 -noenc -sha384 -keyout server.key -out server.csr \
    -subj "/CN=$1" 2> /dev/null
openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -sha384 -days 365 -out server.crt 2> /dev/null \
    -extfile <(printf '%s\n' "basicConstraints=critical,CA:FALSE" "keyUsage=critical,digitalSignature" \
        "extendedKeyUsage=serverAuth" "subjectAltName=$names")
rm server.csr
chmod 644 ca.crt server.crt
openssl verify -CAfile ca.crt server.crt
