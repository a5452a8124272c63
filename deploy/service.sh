# shellcheck shell=bash
# The part of install.sh that makes the service; it is sourced there and uses what stands there.
: "${prefix:?}" "${model:?}" "${name:?}" "${here:?}" "${extras:?}" "${venv:?}" "${archive?}" "${before?}"
: "${work:?}" "${systemd:?}" "${dry:?}"

unit="llava-deploy@$name.service" place=/etc/systemd/system/llava-deploy@.service
version="$(systemctl --version 2>/dev/null | awk 'NR == 1 { print $2 }')"
rendered() {
    local changes=(-e "s|/opt/llava-deploy|$prefix|g")
    if ((${version:-0} < 254)); then # it knows no growing delays
        changes+=(-e '/^RestartSteps=/d' -e '/^RestartMaxDelaySec=/d' -e 's/^RestartSec=.*/RestartSec=30s/')
    fi
    sed "${changes[@]}" -- "$here/llava-deploy@.service"
}
units=("$place" "$place.d/gpu.conf" "$place.d/jetson.conf")
for path in "${units[@]}"; do
    [[ $dry == yes || ! -f $root$path ]] || cp -- "$root$path" "$work/"
done
rendered | write "$place" 644
case $extras in
    *rtx* | *tensorrt* | *gpu*) write "$place.d/gpu.conf" 644 <"$here/gpu.conf" ;;
    jetson) write "$place.d/jetson.conf" 644 <"$here/jetson.conf" ;;
esac
if [[ -n $archive && ! -e $root/etc/llava-deploy/$name.env ]]; then
    # shellcheck disable=SC2016
    printf '# Of the service %s; see: llava-deploy serve --help\nLLAVA_DEPLOY_OPTIONS=\n' "$unit" |
        write "/etc/llava-deploy/$name.env" 644 config
fi
if [[ -n $root ]]; then
    say "   The unit is written; in that system: systemd-sysusers, then systemctl enable $unit"
elif [[ $systemd == no ]]; then
    say "   systemd does not run here: the unit is written, and nothing was started"
else
    root systemctl daemon-reload
    if [[ -n $archive ]]; then
        note unit "$unit"
        root systemctl enable "$unit"
        if ! root systemctl restart "$unit"; then
            say "error: $unit does not start; what it says: journalctl -u $unit -n 50" >&2
            if [[ -n $before ]]; then
                say "   Back to what ran before" >&2
                back
                for path in "${units[@]}"; do
                    if [[ -f $work/${path##*/} ]]; then root install -m 644 -- "$work/${path##*/}" "$path"; else root rm -f -- "$path"; fi
                done
                root systemctl daemon-reload
                root systemctl restart "$unit" || true
                root rm -rf -- "$venv"
            fi
            exit 1
        fi
        say "   It answers on /run/llava-deploy/$name/socket; who may ask: usermod -aG llava-deploy USER"
    fi
    # Services of other models go over to the new program, too.
    for other in $(systemctl list-units --plain --no-legend 'llava-deploy@*.service' | awk '{ print $1 }'); do
        [[ -n $archive && $other == "$unit" ]] || root systemctl restart "$other"
    done
fi
