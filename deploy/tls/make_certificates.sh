#!/bin/sh
# A test authority and one certificate for each worker, for mutual TLS between them. For test deployments: the
# authority's key lies unencrypted beside the certificates, and nothing revokes or renews. Overwrites nothing.
#
#   make_certificates.sh FOLDER [--trusted HOST[,HOST]] [--gpu HOST[,HOST]] [--days N]
#
# Hosts are names or IPv4 addresses; localhost and 127.0.0.1 are always in. Default: 30 days.
# What each worker needs of it, with its flags:
#   trusted worker   --tls-certificate trusted-worker.pem --tls-key trusted-worker.key --tls-authority authority.pem
#   GPU worker       --tls-certificate gpu-worker.pem     --tls-key gpu-worker.key     --tls-authority authority.pem
# Keep authority.key away from both: whoever has it makes certificates that they accept.
set -euf
umask 077

refuse() {
    echo "make_certificates.sh: $1" >&2
    exit 2
}

names() { # "a,10.0.0.1" -> "DNS:localhost,IP:127.0.0.1,DNS:a,IP:10.0.0.1"
    list=DNS:localhost,IP:127.0.0.1
    for host in $(echo "$1" | tr , ' '); do
        case $host in
        *[!A-Za-z0-9.-]*) refuse "$host is neither a host name nor an IPv4 address" ;;
        *[!0-9.]*) list=$list,DNS:$host ;;
        *) list=$list,IP:$host ;;
        esac
    done
    echo "$list"
}

make_pair() { # name, subject alternative names, uses
    openssl req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$folder/$1.key" -subj "/CN=$1" \
        -out "$work/request.pem" 2>"$work/errors" || refuse "$(cat "$work/errors")"
    {
        echo "basicConstraints = critical, CA:FALSE"
        echo "keyUsage = critical, digitalSignature"
        echo "extendedKeyUsage = $3"
        echo "subjectAltName = $2"
    } >"$work/extensions"
    openssl x509 -req -in "$work/request.pem" -CA "$folder/authority.pem" -CAkey "$folder/authority.key" \
        -set_serial "0x$(openssl rand -hex 16)" -days "$days" -sha256 -extfile "$work/extensions" \
        -out "$folder/$1.pem" 2>"$work/errors" || refuse "$(cat "$work/errors")"
}

folder='' trusted='' gpu='' days=30
while [ $# -gt 0 ]; do
    case $1 in
    --trusted | --gpu | --days)
        [ $# -gt 1 ] || refuse "$1 needs a value"
        case $1 in --trusted) trusted=$2 ;; --gpu) gpu=$2 ;; --days) days=$2 ;; esac
        shift
        ;;
    -*) refuse "there is no option $1" ;;
    *)
        [ -z "$folder" ] || refuse "one folder, please"
        folder=$1
        ;;
    esac
    shift
done
[ -n "$folder" ] || refuse "name the folder that the certificates go to"
case $days in '' | 0* | *[!0-9]*) refuse "--days $days is not a number of days" ;; esac
command -v openssl >/dev/null || refuse "openssl is not installed"
trusted=$(names "$trusted")
gpu=$(names "$gpu")
for name in authority trusted-worker gpu-worker; do
    for file in "$folder/$name.key" "$folder/$name.pem"; do
        [ ! -e "$file" ] || refuse "$file exists and is not overwritten"
    done
done

mkdir -p "$folder"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout "$folder/authority.key" -sha256 \
    -days "$days" -subj "/CN=Cleave test authority" -addext "basicConstraints=critical,CA:TRUE,pathlen:0" \
    -addext "keyUsage=critical,keyCertSign" -out "$folder/authority.pem" 2>"$work/errors" ||
    refuse "$(cat "$work/errors")"
make_pair trusted-worker "$trusted" serverAuth,clientAuth
make_pair gpu-worker "$gpu" serverAuth # it connects to nobody
chmod 0644 "$folder/authority.pem" "$folder/trusted-worker.pem" "$folder/gpu-worker.pem"
echo "test certificates in $folder, valid for $days days; keep authority.key away from the workers"
